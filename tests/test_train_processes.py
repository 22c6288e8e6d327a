"""Training in several processes: one writes, all train."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from spacy_sam.bank import ExpertBank

ROOT = Path(__file__).parent.parent
CONFIG = """
[base]
kind = "random"
vocab_size = 600
context = 256
hidden_size = 32
n_layers = 2
n_heads = 2

[base_training]

[base_training.first]
max_steps = 3
learning_rate = 0.001
bf16 = false

[expert_training]
max_steps = 2
learning_rate = 0.001
bf16 = false

[domains]

[domains.cooking]
train = ["{data}/cooking.train.jsonl"]
dev = ["{data}/cooking.dev.jsonl"]

[training]
dev_texts = 3
"""


@pytest.mark.parametrize("launcher", [["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]])
def test_train_under_torchrun(launcher, tmp_path):
    config = tmp_path / "train.cfg"
    config.write_text(CONFIG.format(data=(ROOT / "assets" / "demo").as_posix()), encoding="utf8")
    command = [sys.executable, "-m", *launcher, "-m", "spacy", "sam", "train", str(config), str(tmp_path / "bank")]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (done.stdout + done.stderr).count("is in the bank") == 1
    bank = ExpertBank(tmp_path / "bank")
    assert bank.check() == ["cooking"]
    assert set(bank["cooking"].scores) == {"cooking"}
