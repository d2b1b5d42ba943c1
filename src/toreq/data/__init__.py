"""Data sets in memory, tasks on sequences, index batches, seeded noise and corruptions."""

from toreq.data.audio import Recordings, load_recordings, log_spectrogram
from toreq.data.augment import Augmentation
from toreq.data.batches import Batches, seeded
from toreq.data.dataset import Dataset, Split, balanced_subset, check_batch
from toreq.data.registry import load, names, sequence_task, sequence_task_names
from toreq.data.sequences import Batch, Sequences, SequenceTask
from toreq.data.synthetic import blob_dataset, blobs, two_moons
from toreq.data.text import Text, load_text, next_character_windows
from toreq.data.transforms import (
    blur,
    contrast,
    corrupt,
    corruptions,
    gaussian_noise,
    occlusion,
    random_shift,
    salt_and_pepper,
    shift,
)

__all__ = [
    "Augmentation",
    "Batch",
    "Batches",
    "Dataset",
    "Recordings",
    "SequenceTask",
    "Sequences",
    "Split",
    "Text",
    "balanced_subset",
    "blob_dataset",
    "blobs",
    "blur",
    "check_batch",
    "contrast",
    "corrupt",
    "corruptions",
    "gaussian_noise",
    "load",
    "load_recordings",
    "load_text",
    "log_spectrogram",
    "names",
    "next_character_windows",
    "occlusion",
    "random_shift",
    "salt_and_pepper",
    "seeded",
    "sequence_task",
    "sequence_task_names",
    "shift",
    "two_moons",
]
