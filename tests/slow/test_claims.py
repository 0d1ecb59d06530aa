"""Every number of the prose: all notebooks run at the paper profile, from what is stored."""

import os
import subprocess

from reports import committed_bytes

from deltarank.runtime import ROOT


def test_every_claim_of_the_prose_holds(tmp_path):
    before = committed_bytes()
    settings = {"BUILD": str(tmp_path), "VENUE": "neurips", "PROGRESS": "off", "MODEL": ""}
    settings["LOWRANK_CACHE"] = str(ROOT / ".cache")  # the model that other slow tests converted
    command = ["make", "-C", str(ROOT), "figures"]
    done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert committed_bytes() == before
