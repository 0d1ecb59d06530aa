"""The whole report at the smoke profile, by the command that readers use."""

import os
import subprocess

from deltarank.runtime import ROOT

COMMITTED = [ROOT / "data", ROOT / "figures", ROOT / "notebooks"]


def committed_bytes():
    files = [path for folder in COMMITTED for path in folder.rglob("*") if path.is_file()]
    return {path: path.stat().st_mtime_ns for path in files}


def make_report(build, model=""):
    environment = os.environ | {"PROFILE": "smoke", "BUILD": str(build), "PROGRESS": "off"}
    environment |= {"MODEL": model}
    command = ["make", "-C", str(ROOT), "report"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
