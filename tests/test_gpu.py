"""What only a GPU shows, on those that are named: SUPCON_TEST_GPUS=0,1 bash scripts/test.sh tests/test_gpu.py"""
import os

import pytest
from conftest import ROOT, shell


@pytest.mark.skipif(not os.environ.get('SUPCON_TEST_GPUS'), reason='SUPCON_TEST_GPUS names no GPU')
def test_everything_works_on_a_gpu():
    done = shell(['bash', 'scripts/check_gpu.sh'], ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
