"""Diagnostics: `check` (are the gradients right), `doctor` (what holds a run back), `show` (pictures), the
demo report."""

from toreq.diagnostics.check import check, run_check
from toreq.diagnostics.doctor import diagnose, run_doctor
from toreq.diagnostics.memory import StorageMeter, memory_against_steps, peak_bytes
from toreq.diagnostics.report import write_demo_report
from toreq.diagnostics.show import run_show

__all__ = [
    "StorageMeter",
    "check",
    "diagnose",
    "memory_against_steps",
    "peak_bytes",
    "run_check",
    "run_doctor",
    "run_show",
    "write_demo_report",
]
