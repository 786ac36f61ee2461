"""The report of the benchmark suite, from made-up results whose verdicts can be checked by hand."""

import builtins
import json
import math
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from made_up import EVERYTHING, FAILED, OURS, ROUTINE, result, row, sweep

pytest.importorskip("matplotlib")

from bench.report import run as script
from bench.report.data import goals_of, pairwise_ratio, rows_of
from bench.report.files import dump, load, rounded, write
from bench.report.readme import END, START, readme_table
from bench.report.render import markdown, page
from bench.report.sweeps import doublings, fitted_slope
from bench.report.tables import contents
from kdkernels.testing import timing


def text_of(recorded):
    return markdown(contents(recorded))


def html_of(recorded):
    return page(contents(recorded))


def section(text, title):
    return text.partition(f"## {title}\n")[2].partition("\n## ")[0]


class Checker(HTMLParser):
    """Checks that tags are closed, and collects their contents."""

    def __init__(self):
        super().__init__()
        self.open, self.seen, self.ids, self.captions = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.seen.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        assert not [v for n, v in attrs if n in {"src", "href", "xlink:href"} and not v.startswith("#")]
        if tag not in {"meta", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in {"meta", "br"}:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "figcaption":
            self.captions.append(data)


def test_ratios_are_of_rounds_and_not_of_medians():
    one = rows_of(result(row()))[0]
    assert one.seconds["kdkernels"] == 0.001
    assert [one.ratios["eager"].median, one.ratios["eager"].low, one.ratios["eager"].high] == pytest.approx([4, 4, 4])
    assert one.ratios["compile"].median == pytest.approx(1.0)
    verdicts = {rival: ratio.verdict for rival, ratio in one.ratios.items()}
    assert verdicts == {"eager": "faster", "compile": "tie", "compile max-autotune": "slower"}
    assert one.better_compile == "compile max-autotune"


def test_summary_counts_and_losses_are_listed_before_ties():
    text = text_of(result(row(), row(mode="forward")))
    summary = section(text, "Summary")
    assert "| eager | rows | 2 | 2 | 0 | 0 | 0 |" in summary
    assert "| compile | rows | 2 | 0 | 2 | 0 | 0 |" in summary
    assert "| compile max-autotune | rows | 2 | 0 | 0 | 2 | 0 |" in summary
    assert "| liger | rows | 0 | 0 | 0 | 0 | 2 |" in summary
    behind = [line for line in section(text, "Where kdkernels does not win").splitlines() if "float32" in line]
    assert len(behind) == 4
    assert all("compile max-autotune | 1.00 | 0.500 | × 0.50 (0.50–0.50) slower" in line for line in behind[:2])
    assert all("| tie (0.90–1.2)" in line for line in behind[2:])


def test_a_report_without_losses_says_so():
    rounds = {"kdkernels": OURS, "eager": [9 * t for t in OURS]}
    assert "Nowhere in this run." in section(text_of(result(row(rounds=rounds))), "Where kdkernels does not win")


def test_goals_say_by_how_much_they_were_missed():
    report = result(row(goals={"faster than eager": 5.0, "faster than compile": 0.4, "faster than liger": 1.0,
                               "share of copy bandwidth": 0.6, "beautiful": 1.0}))  # fmt: skip
    judged = {goal.name: goal for goal in goals_of(rows_of(report), 4e9)}
    assert judged["faster than eager"].verdict == "missed"
    # Compared with the mode that is harder to beat.
    assert judged["faster than compile"].measured == pytest.approx(0.5)
    assert judged["faster than compile"].verdict == "met"
    # 2 MB in 1 ms are 2 GB/s, half of the copy's 4.
    assert judged["share of copy bandwidth"].measured == pytest.approx(0.5)
    assert judged["faster than liger"].note == "needs a GPU"
    text = section(markdown(contents(report)), "Goals")
    assert "1 met, 2 missed, 2 not judged" in text
    assert "| faster than eager | eager | missed by 20.0 % | 5.0 | 4.0 |" in text
    assert "| faster than compile | compile max-autotune | met | 0.40 | 0.50 |" in text
    assert "| faster than liger |  | not judged: needs a GPU | 1.000 | – |" in text
    assert "| beautiful |  | not judged: not measured | 1.000 | – |" in text


def test_goals_that_are_upper_bounds():
    graph = {"kdkernels": {"microseconds": 12.5, "launches_forward": 2, "launches_backward": 3}}
    goals = {"graph microseconds": 15.0, "launches forward": 2, "launches backward": 2}
    report = result(row(goals=goals, graph=graph))
    verdicts = {goal.name: goal.verdict for goal in goals_of(rows_of(report), 4e9)}
    assert verdicts == {"graph microseconds": "met", "launches forward": "met", "launches backward": "missed"}
    text = text_of(report)
    assert "| launches backward |  | missed by 50.0 % | 2.0 | 3.0 |" in text
    assert "| kdkernels | 12.5 | 2 | 3 | – |" in section(text, "Under a CUDA graph")
    failed = result(row(goals=goals, graph={"kdkernels": {"why_not": "capture failed"}}))
    assert {goal.note for goal in goals_of(rows_of(failed), 4e9)} == {"capture failed"}


def test_a_failed_row_has_no_speed():
    text = text_of(EVERYTHING)
    lines = [line for line in text.splitlines() if "broken" in line]
    reason = "relative error 3e-1, allowed 1e-3"
    assert f"| broken 256×1000 float32 dim=1 full | {reason} |" in lines
    # The other rows are its goals, which are not judged.
    assert all(reason in line for line in lines)
    assert "### total_variation" not in text
    assert "| broken 256×1000 float32 dim=1 | failed | – | – |" in readme_table(EVERYTHING)


def test_failures_before_anything_was_recorded():
    report = result(row(), {"name": "test_op[lost]", "extra_info": {"failed": "wrong"}})
    assert "| test_op\\[lost\\] | wrong |" in section(text_of(report), "Failures, and what was not timed")


@pytest.mark.parametrize("changes", [{"rounds": {}}, {"not_timed": {"kdkernels": "wrong"}}], ids=str)
def test_a_row_without_times_failed(changes):
    one = rows_of(result(row(**changes)))[0]
    assert one.failed in ("not timed", "wrong")
    assert not one.ratios


def test_rounds_that_do_not_pair_up_raise():
    with pytest.raises(ValueError, match="shorter"):
        text_of(result(row(rounds={"kdkernels": OURS, "eager": [1.0, 2.0]})))


def test_ratios_are_those_of_the_package():
    theirs = [0.002, 0.0011, 0.003, 0.004, 0.0008]
    for count in (1, 2, 5):
        ours, package = (f(OURS[:count], theirs[:count]) for f in (pairwise_ratio, timing.pairwise_ratio))
        assert (ours.median, ours.low, ours.high) == (package.median, package.low, package.high)
        assert ours.verdict == package.verdict


def test_slope_is_fitted_to_the_upper_half():
    seconds = {1: 7.0, 2: 7.0, 4: 3 * 4**1.5, 8: 3 * 8**1.5}
    assert fitted_slope(seconds) == pytest.approx(1.5)
    # Logarithms to base 2: points (0, 0), (1, 2), (2, 1) have the slope 1/2.
    assert fitted_slope({1: 5.0, 2: 5.0, 4: 1.0, 8: 4.0, 16: 2.0}) == pytest.approx(0.5)
    assert fitted_slope({4: 1.0}) is None


def test_cost_of_a_doubling():
    steps = doublings({64: 1.0, 128: 3.0, 512: 12.0, 768: 12.0 * 1.5**2})
    assert steps == pytest.approx({128: 3.0, 512: 2.0, 768: 4.0})  # ×4 takes ×4; ×1.5 takes its square


def test_sweep_flags_and_points():
    text = section(text_of(EVERYTHING), "Sweeps")
    assert "- kl_div_with_logits, batch, kdkernels: the step to 512 costs × 3.00 per doubling" in text
    assert text.count("per doubling") == 1
    slope = math.log2(3)
    assert f"Slopes: kdkernels {slope:.2f}, eager 1.00; expected 1." in text
    assert "| batch in rows | ours, ms | eager | doubling, kdkernels | doubling, eager |" in text
    assert "| 64 | 0.100 | × 6.4 (6.4–6.4) | – | – |" in text
    assert "| 128 | 0.150 | × 8.5 (8.5–8.5) | 1.50 | 2.00 |" in text
    assert "| 512 | 0.900 | × 5.7 (5.7–5.7) | 3.00 (!) | 2.00 |" in text


def test_tables_say_whether_caches_were_cold():
    text = text_of(result(row(), row("deep_inversion", kind="routine", mode="step", cold=False), sweep(cold=False)))
    assert "| kl_div_with_logits | 256×1000 | float32 | dim=1 | full | cold | 1.00 | × 4.0 (4.0–4.0) |" in text
    assert "| deep_inversion | 256×1000 | float32 | dim=1 | step | warm | 1.00 |" in text
    assert "Inputs may come from caches." in text


def test_roofline():
    text = section(text_of(result(row())), "Memory and bandwidth")
    # Passes, MB, GB/s, share, peak memory of both, seconds to compile.
    assert "| cold | 3 | 2.00 | 2.00 | 50 % | 0.00410 | 3.00 | 8.12 |" in text


MISSING = {
    "no benchmarks": result(),
    "no roofline": {**result(row()), "roofline": {}},
    "no rivals": result(row(rounds={"kdkernels": OURS}, not_timed={})),
    "nothing but times": result({"name": "test", "extra_info": {"rounds": {"kdkernels": [1.0]}}}),
    "one round": result(row(rounds={"kdkernels": [1.0], "eager": [2.0]})),
    "a sweep of one value": result(sweep(rounds={"kdkernels": {"64": [1.0]}})),
    "a failed sweep": result(sweep(failed="wrong")),
    "an error that is not a number": result(row(errors={"kdkernels": math.nan, "eager": 1e-7})),
    "only a failure": result({"name": "test_lost", "extra_info": {"failed": "wrong"}}),
    "only a routine": result(ROUTINE),
}


@pytest.mark.parametrize("recorded", MISSING.values(), ids=MISSING)
def test_missing_parts_are_tolerated(recorded, tmp_path):
    assert write(recorded, tmp_path) == ["report.md", "report.html", "report.json"]
    assert (tmp_path / "report.md").read_text().startswith("# kdkernels")
    checker = Checker()
    checker.feed((tmp_path / "report.html").read_text())
    assert not checker.open
    text = (tmp_path / "report.json").read_text()
    assert readme_table(json.loads(text, parse_constant=pytest.fail))  # no NaN, which JSON does not have


def test_html_is_complete_and_has_one_plot_of_each_kind():
    checker = Checker()
    text = html_of(result(row(), sweep()))
    checker.feed(text)
    checker.close()
    assert not checker.open
    assert len(checker.ids) == len(set(checker.ids))
    assert checker.seen.count("svg") == checker.seen.count("figure") == 2
    assert "script" not in checker.seen
    kinds = ("time of each rival over ours", "median time against batch in rows")
    assert [sum(kind in caption for caption in checker.captions) for kind in kinds] == [1, 1]
    assert "slope 1.58" in text


def test_many_rows_are_split_into_readable_figures():
    rows = [row(f"function_{i}", shape=[i, j]) for i in range(8) for j in range(9)]
    checker = Checker()
    checker.feed(html_of(result(*rows)))
    assert sum("time of each rival over ours" in caption for caption in checker.captions) == 3


def test_text_is_escaped():
    recorded = result(row("f<b>|$x_1$&", variant="a|b"), FAILED)
    recorded["benchmarks"][1]["extra_info"]["failed"] = "<script>alert(1)</script> | [x](y)"
    text, page_text = text_of(recorded), html_of(recorded)
    assert "<script" not in page_text
    assert "A &lt;fast&gt; machine" in page_text
    assert "A \\<fast\\> machine" in text
    assert "\\<script\\>alert(1)\\</script\\> \\| \\[x\\](y)" in text
    assert "f\\<b\\>\\|$x_1$&" in text


def test_files_and_an_earlier_report_as_input(tmp_path):
    source, first, second = tmp_path / "input.json", tmp_path / "first", tmp_path / "second"
    source.write_text(json.dumps(EVERYTHING))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n\n{START}\nold\n{END}\n\nafter\n")
    script.main([str(source), "--output", str(first), "--readme", str(readme)])
    once = readme.read_text()
    script.main([str(first / "report.json"), "--output", str(second), "--readme", str(readme)])
    assert readme.read_text() == once
    for name in ("report.md", "report.html", "report.json"):
        assert (first / name).read_text() == (second / name).read_text()
    assert once.startswith("before\n\n")
    assert once.endswith("\n\nafter\n")
    assert "old" not in once
    assert readme_table(load(first / "report.json")) in once


def test_a_report_keeps_four_digits_of_what_was_measured(tmp_path):
    recorded = result(row(rounds={"kdkernels": [0.00123456]}, bytes=123456789))
    write(recorded, tmp_path)
    report = load(tmp_path / "report.json")
    info = report["benchmarks"][0]["extra_info"]
    assert (info["rounds"]["kdkernels"], info["bytes"]) == ([0.001235], 123456789)
    assert report["benchmarks"] == rounded(recorded["benchmarks"])
    assert report["roofline"] == recorded["roofline"]
    assert dump(report) == (tmp_path / "report.json").read_text()


def test_without_matplotlib_there_is_no_page(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name="matplotlib")
        return real(name, *arguments, **options)

    monkeypatch.delitem(sys.modules, "bench.report.plots", raising=False)
    monkeypatch.setattr(builtins, "__import__", without)
    assert write(EVERYTHING, tmp_path) == ["report.md", "report.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]


def test_a_report_needs_no_pytorch():
    code = "import sys, bench.gpu.run, bench.report.run; print(*({'torch', 'matplotlib'} & sys.modules.keys()))"
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "\n"
