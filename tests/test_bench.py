"""The speed of both sides in results and on the page; what is compared is in the papers' tests."""

import json

from common.evaluation import bench

import pytest


@pytest.fixture
def root(tmp_path):
    (tmp_path / "common" / "results").mkdir(parents=True)
    (tmp_path / "RESULTS.md").write_text(
        "before\n\n<!-- results: speed -->\n\nold\n\n<!-- end of results -->\n\nafter\n")
    return tmp_path


def row(theirs, ours):
    return {"compressai_ms": theirs, "ours_ms": ours, "ratio": theirs / ours, "runs": 3}


def test_published_rows_are_on_the_page_and_stay(root, monkeypatch):
    """Of another paper on the same machine; rows of another machine are replaced."""
    path = root / "common" / "results" / "bench.json"
    for name, times in (("a: compress", (1234, 500)), ("b: compress", (30, 20))):
        monkeypatch.setattr(bench, "measured", {name: row(*times)})
        bench.publish(root, bench.facts("a CPU"))
    assert list(json.loads(path.read_text())["rows"]) == ["a: compress", "b: compress"]
    page = (root / "RESULTS.md").read_text()
    assert [[cell.strip() for cell in line.strip("|").split("|")]
            for line in page.splitlines() if ": compress" in line] == [
        ["a: compress", "1,234 ms", "500 ms", "2.5x", "3"],
        ["b: compress", "30 ms", "20 ms", "1.5x", "3"]]
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "a CPU" in page
    bench.publish(root, bench.facts("another CPU"))
    assert list(json.loads(path.read_text())["rows"]) == ["b: compress"]


def test_cpu_time_does_not_count_waiting(monkeypatch):
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda n: None)
    monkeypatch.setattr(bench, "clock", bench.clock)  # restored afterwards
    bench.use_cpu_time()
    assert bench.clock is bench.time.process_time
    assert bench.facts("a CPU")["measured"] == "CPU time of one thread"
