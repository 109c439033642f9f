"""make claims: published differences beside those of equal trainings."""

import json
import statistics

from common import UserError, cli
from common.comparison import claims
from common.evaluation.curve_values import cost
from common.evaluation.results import load_results
from common.papers import ROOT
from common.recipes.tables import table_of

import pytest
import yaml

CONTENT = yaml.safe_load((ROOT / "claims.yaml").read_text())["claims"]
HYPER = {"published": {"this": "bmshj2018-hyperprior", "other": "bmshj2018-factorized"}}


def ours(tmp_path, rows, **claim):
    (tmp_path / "rows.json").write_text(json.dumps({"rows": rows}))
    return claims.measured(tmp_path, {
        "ours": {"file": "rows.json", "this": "a", "other": "b"}, **claim})


def curve(lmbdas, points):
    return {"name": "x", "results": {"bpp": [b for b, _ in points],
                                     "psnr-rgb": [p for _, p in points]},
            "meta": {"lmbda": lmbdas}}


@pytest.mark.parametrize("claim", CONTENT, ids=[claim["claim"] for claim in CONTENT])
def test_every_claim_has_its_published_number(claim):
    percent, source = claims.published_percent(ROOT, claim)
    assert -60 < percent < 60 and source
    assert (ROOT / claim["paper"] / "model.py").exists() and claim["ours"]["budget"]


def test_published_gain_of_the_hyperprior():
    """From the BD-rates against VTM, +31.0 and +68.7 %: about -22 %, over another range."""
    assert claims.published_percent(ROOT, HYPER)[0] == pytest.approx(-21, abs=2)


def test_costs_become_rates(tmp_path):
    """10 % less cost, at a cost of twice the rate, is 20 % of the rate."""
    rows = {"a": {"J": 0.9, "bpp": 0.4}, "b": {"J": 1.0, "bpp": 0.5}}
    found = ours(tmp_path, rows)
    assert found.percent == pytest.approx(-20) and found.runs == 1
    assert found.error == pytest.approx(100 * claims.SPREAD * (0.9**2 + 1) ** 0.5 / 0.5)
    assert ours(tmp_path, rows, unit="cost").percent == pytest.approx(-10)


def test_the_spread_is_that_of_the_seeds():
    seeds = [claims._repetitions(load_results(path)).costs
             for path in ROOT.glob("*/results/equal.json")]
    variance = statistics.mean(statistics.variance(costs) / statistics.mean(costs)**2
                               for costs in seeds)
    assert len(seeds) == 3 and claims.SPREAD == pytest.approx(variance**0.5, abs=0.0001)


def test_seeds_give_the_error(tmp_path):
    a, b = [0.9, 0.92, 0.94], [1.0, 1.0, 1.0]
    found = ours(tmp_path, {"a": {"loss": a, "bpp": [0.4, 0.4, 0.4]},
                            "b": {"loss": b, "bpp": [0.5, 0.5, 0.5]}})
    assert (found.percent, found.runs) == (pytest.approx(-16), 3)
    assert found.error == pytest.approx(200 * statistics.stdev(a) / 3**0.5)


def test_results_of_seeds_and_of_curves(tmp_path):
    claim = {"ours": {"this": "a.json", "other": "b.json"}}
    assert claims.measured(tmp_path, claim) is None  # not trained yet
    a, b = [(0.4, 30.0), (0.42, 30.1)], [(0.5, 30.0), (0.51, 30.0)]
    for name, points in (("a", a), ("b", b)):
        (tmp_path / f"{name}.json").write_text(json.dumps(curve([0.01, 0.01], points)))
    found = claims.measured(tmp_path, claim)
    mean = [statistics.mean(cost(*point, 0.01) for point in points) for points in (a, b)]
    assert found.percent == pytest.approx(100 * (mean[0] - mean[1]) / 0.505)
    assert found.error == pytest.approx(  # two costs do not tell their spread
        100 * claims.SPREAD * (mean[0]**2 + mean[1]**2)**0.5 / 2**0.5 / 0.505)
    of_cost = claims.measured(tmp_path, {**claim, "unit": "cost"})
    assert of_cost.percent == pytest.approx(100 * (mean[0] / mean[1] - 1))
    for name, factor in (("a", 0.9), ("b", 1)):
        points = [(factor * rate, psnr) for rate, psnr in ((0.2, 28.0), (0.4, 31.0), (0.8, 34.0))]
        (tmp_path / f"{name}.json").write_text(json.dumps(curve([0.01, 0.02, 0.04], points)))
    assert claims.measured(tmp_path, claim).percent == pytest.approx(-10, abs=0.01)


def test_one_point_is_compared_at_its_lmbda(tmp_path):
    """With the point of a curve that was trained at the same lmbda, not with the whole curve."""
    claim = {"ours": {"this": "a.json", "other": "b.json"}}
    (tmp_path / "a.json").write_text(json.dumps(curve([0.02], [(0.4, 31.0)])))
    (tmp_path / "b.json").write_text(json.dumps(curve([0.01, 0.02], [(0.2, 28.0), (0.5, 31.0)])))
    assert claims.measured(tmp_path, claim).percent == pytest.approx(-20)


def test_only_comparable_curves_are_compared(tmp_path):
    """Of the same images; costs at one lmbda only."""
    claim = {"ours": {"this": "a.json", "other": "b.json"}}
    one, other = curve([0.01], [(0.4, 30.0)]), curve([0.02], [(0.5, 31.0)])
    for name, content in (("a", one), ("b", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="do not overlap"):
        claims.measured(tmp_path, claim)
    one["meta"]["images_digest"] = "3 images 0123"
    (tmp_path / "a.json").write_text(json.dumps(one))
    with pytest.raises(UserError, match="are not of the same images"):
        claims.measured(tmp_path, claim)


@pytest.mark.parametrize(("claim", "published", "percent", "error", "words"), [
    ({}, -20, -15, 2, "as claimed"), ({}, -20, -5, 2, "as claimed, less"),
    ({}, -5, -15, 2, "as claimed, more"), ({}, -20, -3, 2, "open: within the noise"),
    ({}, -20, 5, 2, "the opposite, at this budget"),
    ({"within": 5}, 3, 1, 2, "as claimed (at most +5 %)"),
    ({"within": 5}, 3, 3, 2, "open (at most +5 %)"),
    ({"within": 5}, 3, 40, 2, "not seen (at most +5 %)")])
def test_verdicts(claim, published, percent, error, words):
    claim = {"published": {"percent": published}, **claim}
    assert claims.verdict(claim, published, claims.Measured(percent, error, 1)) == words


def test_unknown_names_are_errors(tmp_path):
    with pytest.raises(UserError, match="has no row a; it has b"):
        ours(tmp_path, {"b": {"J": 1, "bpp": 1}})
    with pytest.raises(UserError, match="has no curve nothing"):
        claims.published_percent(ROOT, {"published": {"this": "nothing", "other": "VTM"}})


BROKEN = {
    "a: [": "not YAML", "": "must hold a list of claims",
    "claims: {}": "must hold a list of claims",
    "claims: [1]": "claim 1: must hold 'key: value' lines",
    "claims: [{claim: x}]": "claim 1: paper is missing"}
MISTAKES = [
    ({"publishd": {}}, "claim 1: there is no key publishd"),
    ({"published": {"this": "VTM"}}, "claim 1: published: other is missing"),
    ({"published": {"percent": "four", "source": "x"}}, "percent: 'four' is not a value"),
    ({"published": {"percent": 0, "source": "x"}}, "percent: 0 has no direction"),
    ({"published": {"percent": True, "source": "x"}}, "percent: True is not a value"),
    ({"within": True}, "within: True is not a value"),
    ({"claim": "a | b"}, "claim: one line without |"),
    ({"ours": {"this": "a", "other": "b"}}, "claim 1: ours: budget is missing"),
    ({"within": "five"}, "claim 1: within: 'five' is not a value"),
    ({"unit": "costs"}, "unit: 'costs' is neither rate nor cost")]


@pytest.mark.parametrize(("text", "words"), [*BROKEN.items(), *(
    (json.dumps({"claims": [CONTENT[0] | change]}), words) for change, words in MISTAKES)])
def test_mistakes_in_claims_yaml_are_one_line(tmp_path, capsys, text, words):
    (tmp_path / "claims.yaml").write_text(text)
    with pytest.raises(SystemExit) as end:
        cli.run(lambda: claims.main([], tmp_path))
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith("error: claims.yaml: ") and words in error


@pytest.mark.parametrize(("text", "words"), [
    ("{", "not JSON"), ("{}", 'has no "rows"'), ('{"rows": {"a": {"bpp": 1}}}', "row a needs bpp"),
    ('{"rows": {"a": 3}}', "row a needs bpp"),
    ('{"rows": {"a": {"J": "1", "bpp": 1}}}', "row a: J must be a positive number"),
    ('{"rows": {"a": {"J": [1, NaN], "bpp": 1}}}', "row a: J must be a positive number"),
    ('{"rows": {"a": {"J": [], "bpp": 1}}}', "row a: J must be a positive number"),
    ('{"rows": {"a": {"J": 1, "bpp": 0}}}', "row a: bpp must be a positive number")])
def test_results_of_the_wrong_form_are_named(tmp_path, text, words):
    (tmp_path / "rows.json").write_text(text)
    with pytest.raises(UserError, match=words):
        claims.measured(tmp_path, {"ours": {"file": "rows.json", "this": "a", "other": "a"}})


def test_curves_without_lmbda_are_named(tmp_path):
    for name in "ab":
        (tmp_path / name).write_text(json.dumps(curve(None, [(0.2, 28.0), (0.4, 31.0)])))
    with pytest.raises(UserError, match="do not state their lmbda"):
        claims.measured(tmp_path, {"ours": {"this": "a", "other": "b"}})


def test_the_page_is_up_to_date():
    assert table_of((ROOT / "RESULTS.md").read_text(), claims.NAME) == claims.table(ROOT)
