"""The hooks before a commit: well-formed, and each a program of the checkout's own environment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
CONFIG = ROOT / ".pre-commit-config.yaml"


def test_pre_commit_accepts_the_configuration():
    command = [sys.executable, "-m", "pre_commit", "validate-config", str(CONFIG)]
    shown = subprocess.run(command, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stdout


def test_hooks_fetch_nothing():
    for repository in yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["repos"]:
        assert repository["repo"] == "local"
        for hook in repository["hooks"]:
            program = hook["entry"].split()[0]
            assert hook["language"] == "system"
            assert program.startswith(".venv/bin/")
            assert (ROOT / program).exists(), program
