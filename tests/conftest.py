"Fixtures every test file may use."
import signal
from pathlib import Path

import pytest
import torch

from biojepa.core import PATHS

signal.signal(
    signal.SIGINT,
    signal.default_int_handler)  # a shell starts background jobs deaf to Ctrl-C, which some tests send
THREADS = min(2, torch.get_num_threads())
torch.set_num_threads(THREADS)


LONGEST = ("test_paper_notebooks", "test_run", "test_splits", "test_metrics", "test_stages", "test_site",
           "test_datasets", "test_command", "test_data_order", "test_preprocess", "test_model", "test_released")


def pytest_collection_modifyitems(items):
    "Files that take longest come first: two workers, each taking the next file, then end at about the same time."
    items.sort(key=lambda item: [*LONGEST, item.path.stem].index(item.path.stem))


@pytest.fixture(autouse=True)
def as_many_threads_as_before():
    "numba, which scanpy calls, gives torch all threads; a copy of a process with several of them waits for ever."
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def shared()->Path:
    "Folder of the files to check against, beside the project; tests that need it skip where it is absent."
    folder = PATHS.root.parent/"shared"/"data"
    if not folder.is_dir(): pytest.skip("needs the shared data folder beside the project")
    return folder
