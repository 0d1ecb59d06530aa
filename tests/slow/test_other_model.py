"""The whole report runs on a model of another family, by the command that readers use."""

import json

from reports import committed_bytes, make_report


def test_the_whole_report_runs_on_a_model_of_another_family(qwen, tmp_path):
    before = committed_bytes()
    folder = tmp_path / "build" / "smoke-tiny-qwen3"
    assert f"Open {folder}" in make_report(tmp_path / "build", str(qwen))
    assert committed_bytes() == before
    records = [json.loads(path.read_text()) for path in folder.glob("data/runs/*/*/result.json")]
    assert len(records) > 50 and {record["config"]["model"] for record in records} == {str(qwen)}
    page = (folder / "html" / "04_truncate_updates.html").read_text()
    assert "are those of tiny-qwen3" in page and 'class="prose"' in page
