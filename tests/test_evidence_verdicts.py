"""From numbers to verdicts: what holds, what fails, and all that leaves a claim unsettled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from evidence_claims import BASE, OURS, make
from toreq.errors import ConfigError
from toreq.evidence import BUDGETS, Criterion, Outcome, Quantity, claim, claims, judge
from toreq.evidence.registry import chosen

FULL = BUDGETS["full"]


def outcomes(own: dict[int, float | None], base: dict[int, float | None] | None = None) -> dict[Any, Outcome]:
    sides = {OURS: own, BASE: {seed: 80.0 for seed in own} if base is None else base}
    return {(side, seed): Outcome({"score": Quantity(v, "%")}) for side, of in sides.items() for seed, v in of.items()}


def around(value: float) -> dict[int, float | None]:
    return {0: value - 0.1, 1: value, 2: value + 0.1}


def test_a_claim_holds_when_every_criterion_does() -> None:
    found = judge(make(), outcomes(around(90.0)), FULL)
    assert (found.verdict, found.aim_reached) == ("holds", False)
    assert found.holding == ["score", "ahead"]
    first, second = found.findings
    assert (first.mean, first.seeds, first.against) == (pytest.approx(90), 3, None)
    assert (second.mean, second.against) == (pytest.approx(10), BASE)
    assert first.low is not None
    assert first.low < 90 < (first.high or 0)


def test_the_aim_is_reached_apart_from_the_verdict() -> None:
    assert judge(make(), outcomes(around(96.0)), FULL).aim_reached is True
    assert judge(make(), outcomes(around(95.0)), FULL).aim_reached is None


def test_one_failing_criterion_fails_the_claim_and_the_rest_is_named() -> None:
    found = judge(make(), outcomes(around(70.0), {0: 60.0, 1: 60.0, 2: 60.0}), FULL)
    assert (found.verdict, found.holding) == ("fails", ["ahead"])


def test_a_difference_must_exclude_zero() -> None:
    same = outcomes(around(90.0), around(90.0))
    finding = judge(make(), same, FULL).findings[1]
    assert (finding.mean, finding.verdict) == (0.0, "fails")  # never above, at any seed
    mixed = judge(make(), outcomes(around(90.0), {0: 91.0, 1: 89.0, 2: 90.0}), FULL)
    assert mixed.findings[1].verdict == "not settled"
    assert mixed.findings[1].reason == "the interval covers the bound"


def test_the_best_of_several_sides_is_the_one_to_beat() -> None:
    one = make(sides=(OURS, BASE, "second"))
    versus = replace(one.criteria[1], versus=(BASE, "second"))
    runs = outcomes(around(90.0)) | {("second", s): Outcome({"score": Quantity(89.0, "%")}) for s in range(3)}
    for direction, best in (("at_least", "second"), ("at_most", BASE)):
        judged = judge(replace(one, criteria=(replace(versus, direction=direction),)), runs, FULL)
        assert judged.findings[0].against == best


@pytest.mark.parametrize(
    ("runs", "reason"),
    [
        (outcomes({0: 90.0, 1: 90.0}), "2 of 3 seeds"),
        (outcomes({0: 90.0, 1: 90.0, 2: None}), "1 of the runs gave no number"),
        (outcomes({0: 90.0, 1: 90.0, 2: float("nan")}), "1 of the runs gave no number"),
        (outcomes({0: 85.0, 1: 86.0, 2: 84.5}), "the interval covers the bound"),
        ({}, "the side 'ours' has no run"),
        ({k: v for k, v in outcomes(around(90.0)).items() if k[0] == OURS}, "the side 'baseline' has no run"),
    ],
)
def test_what_leaves_a_claim_unsettled(runs: dict[Any, Outcome], reason: str) -> None:
    found = judge(make(), runs, FULL)
    assert found.verdict == "not settled"
    assert any(reason in line for line in found.reasons), found.reasons


def test_a_missing_ablation_leaves_even_a_failure_unsettled() -> None:
    one = make(sides=(OURS, BASE, "ablation"))
    assert judge(one, outcomes(around(10.0)), FULL).verdict == "not settled"


def test_a_smoke_run_settles_nothing() -> None:
    found = judge(make(), outcomes(around(90.0)), BUDGETS["smoke"])
    assert (found.verdict, found.aim_reached) == ("not settled", None)


def test_what_must_be_printed_has_to_be_there() -> None:
    one = make(printed=("radius",))
    assert judge(one, outcomes(around(90.0)), FULL).verdict == "not settled"
    runs = {k: Outcome({**o.metrics, "radius": Quantity(0.4, "")}) for k, o in outcomes(around(90.0)).items()}
    assert judge(one, runs, FULL).verdict == "holds"


@pytest.mark.parametrize(("radius", "wanted"), [(0.5, "holds"), (0.1, "not settled")])
def test_an_unmet_condition_leaves_the_claim_unsettled(radius: float, wanted: str) -> None:
    condition = Criterion("radius", "radius", "", "at_least", OURS, aim=0.3, condition=True)
    one = make(criteria=(*make().criteria, condition))
    runs = {k: Outcome({**o.metrics, "radius": Quantity(radius, "")}) for k, o in outcomes(around(90.0)).items()}
    found = judge(one, runs, FULL)
    assert found.verdict == wanted
    assert "radius" not in found.holding


def test_one_seed_criteria_are_judged_on_their_value_and_labelled() -> None:
    single = make(criteria=(replace(make().criteria[0], seeds=1),))
    found = judge(single, outcomes({0: 90.0}), FULL)
    assert (found.verdict, found.findings[0].one_seed) == ("holds", True)
    assert judge(single, outcomes(around(90.0)), FULL).findings[0].one_seed is False


def test_a_number_for_each_side_stands_beside_the_criterion() -> None:
    finding = judge(make(), outcomes(around(90.0)), FULL).findings[1]
    assert finding.sides[BASE] == {"mean": 80.0, "low": 80.0, "high": 80.0, "seeds": 3}


def test_criteria_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ConfigError, match="a pair of bounds"):
        Criterion("c", "m", "", "between", OURS, target=1.0)
    with pytest.raises(ConfigError, match="got none"):
        Criterion("c", "m", "", "at_least", OURS)
    with pytest.raises(ConfigError, match="linear scale"):
        Criterion("c", "m", "", "at_least", OURS, versus=(BASE,), scale="log")
    with pytest.raises(ConfigError, match="did you mean 'ours'"):
        make(criteria=(Criterion("c", "m", "", "at_least", "our", target=1.0),))


def test_a_fingerprint_follows_the_protocol_and_not_its_spelling() -> None:
    one = make()
    assert make(protocol="Run it   and read\nthe score.").fingerprint == one.fingerprint
    assert make(sentence="Other words.").fingerprint == one.fingerprint
    assert len({c.fingerprint for c in (one, make(protocol="Run it twice."), make(version=2))}) == 3


def test_what_was_run_stays_valid_when_sides_are_added_and_targets_move() -> None:
    one = make()
    assert make(sides=(OURS, BASE, "third")).fingerprint == one.fingerprint
    assert make(criteria=(replace(one.criteria[0], target=86.0), one.criteria[1])).fingerprint == one.fingerprint


def test_claims_by_id_and_by_system() -> None:
    assert claim("b1").id == "B1"
    assert [c.id for c in chosen(["B2", "b1", "B2"])] == ["B2", "B1"]
    assert len(chosen([])) == len(claims()) == len({c.id for c in claims()})
    assert {c.system for c in claims("toreqprop")} == {"toreqprop"}
    with pytest.raises(ConfigError, match="expected the id of a claim, got 'B99'"):
        claim("B99")
    with pytest.raises(ConfigError, match="did you mean 'toreqprop'"):
        claims("toreqpro")
