"""The time until a gallery is shown: measured in real time, by the page."""

from statistics import mean

import pytest
from test_gallery import needs_browser

from tda_core import gallery_speed
from tda_core.gallery_speed import Opening, made_up, main, measure, openings, table

PAGE = """<!DOCTYPE html><script>
const start = performance.now();
while (performance.now() - start < {busy});
setTimeout(() => requestAnimationFrame(() => setTimeout(() => performance.mark("shown"))), {idle});
</script>"""


def test_made_up_documents_are_of_the_size_that_is_told():
    first, second = made_up(200, queries=3)
    assert first.scores.shape == (3, 200) and first.about.method != second.about.method
    assert 250 < mean(map(len, first.train.texts)) < 350 and len(set(first.train.texts)) == 200
    assert made_up(200, queries=3)[1].scores.equal(second.scores) and not first.scores.equal(second.scores)


def test_the_table_has_ratios_to_the_first():
    lines = table([Opening(10, 9, 0.1, 0.5, (100.0, 90.0, 400.0)), Opening(1000, 90, 0.2, 1.5, (300.0,))]).splitlines()
    assert lines[1].split() == ["10", "9", "0.50", "0.10", "100", "90", "400", "1.00"]
    assert lines[2].split()[-4:] == ["300", "300", "300", "3.00"]


def test_a_missing_browser_is_named(monkeypatch, capsys):
    monkeypatch.setattr(gallery_speed.shutil, "which", lambda name: None)
    assert main(["--documents", "10"]) == 1
    assert "no Chromium on this machine, expected one of: chromium" in capsys.readouterr().err


@needs_browser
def test_real_time_is_measured_whether_a_page_works_or_waits(tmp_path):
    page = tmp_path / "page.html"
    for busy, idle in ((600, 0), (0, 600)):
        page.write_text(PAGE.format(busy=busy, idle=idle))
        assert all(600 <= shown < 20_000 for shown in openings(page, 1))


@needs_browser
def test_a_page_that_shows_nothing_is_an_error(tmp_path, monkeypatch):
    page = tmp_path / "page.html"
    page.write_text("<p>nothing</p>")
    monkeypatch.setattr(gallery_speed, "WAIT", 0.5)
    with pytest.raises(TimeoutError, match=r"showed nothing in 0\.5 s"):
        openings(page, 1)


@needs_browser
def test_a_gallery_is_opened_and_measured(tmp_path):
    found = measure(150, tmp_path, times=2)
    assert (found.documents, found.examples, len(found.shown_ms)) == (150, 150, 2)
    assert found.page_mb == pytest.approx((tmp_path / "gallery_150.html").stat().st_size / 1e6)
    assert 0 < min(found.shown_ms) <= found.typical_ms
