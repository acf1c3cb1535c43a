"Fixtures every test file may use."
import signal
from pathlib import Path

import pytest
import torch

from biojepa.core import PATHS

signal.signal(
    signal.SIGINT,
    signal.default_int_handler)  # a shell starts background jobs deaf to Ctrl-C, which some tests send
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session")
def shared()->Path:
    "Folder of the files to check against, beside the project; tests that need it skip where it is absent."
    folder = PATHS.root.parent/"shared"/"data"
    if not folder.is_dir(): pytest.skip("needs the shared data folder beside the project")
    return folder
