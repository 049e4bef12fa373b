"""What every merge method keeps to, whatever its options; what is refused."""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

from peft_hoe import ExpertError
from peft_hoe.cli import main
from peft_hoe.experts.merging import METHODS, check_merge, merge
from peft_hoe.experts.merging.methods import MergeMethod

SEEDS = [11, 22, 33]
CASES = [
    (name, {**method.options, **({"density": density} if "density" in method.options else {})})
    for name, method in METHODS.items()
    for density in ((1.0, 0.6, 0.2) if "density" in method.options else (None,))
]


@pytest.fixture
def deltas():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(6, 7, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_policy_alone_is_its_task_vector_where_all_is_kept(deltas, name, index):
    options = {**METHODS[name].options, "density": 1.0, "gamma": 0.0, "epsilon": 0.3}
    weights = [0.0, 0.0, 0.0]
    weights[index] = 1.0
    chosen = {option: options[option] for option in METHODS[name].options}
    assert torch.equal(merge(deltas, weights, name, chosen, SEEDS), deltas[index])


@pytest.mark.parametrize(("method", "options"), CASES)
def test_order_of_policies_does_not_matter(deltas, method, options):
    weights = [0.5, 0.2, 0.3]
    expected = merge(deltas, weights, method, options, SEEDS)
    for order in itertools.permutations(range(3)):
        permuted = merge(
            [deltas[i] for i in order], [weights[i] for i in order], method, options, [SEEDS[i] for i in order]
        )
        torch.testing.assert_close(permuted, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "options"), CASES)
@pytest.mark.parametrize("factor", [4.0, 1e-3])
def test_scaling_all_task_vectors_scales_the_result(deltas, method, options, factor):
    weights = [0.5, 0.2, 0.3]
    expected = factor * merge(deltas, weights, method, options, SEEDS)
    scaled = merge([factor * delta for delta in deltas], weights, method, options, SEEDS)
    torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-5 * factor)


@pytest.mark.parametrize(("method", "options"), CASES)
def test_policies_of_weight_zero_are_dropped_first(deltas, method, options):
    with_zero = merge(deltas, [0.7, 0.0, 0.3], method, options, SEEDS)
    without = merge([deltas[0], deltas[2]], [0.7, 0.3], method, options, [SEEDS[0], SEEDS[2]])
    assert torch.equal(with_zero, without)
    deltas[1] = deltas[1] * float("inf")
    assert torch.equal(merge(deltas, [0.7, 0.0, 0.3], method, options, SEEDS), without)


@pytest.mark.parametrize(("method", "options"), CASES)
def test_weights_are_proportions(deltas, method, options):
    expected = merge(deltas, [0.5, 0.2, 0.3], method, options, SEEDS)
    torch.testing.assert_close(merge(deltas, [5, 2, 3], method, options, SEEDS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", [name for name, found in METHODS.items() if "density" in found.options])
def test_nothing_is_kept_at_a_density_of_zero(deltas, method):
    options = {**METHODS[method].options, "density": 0.0}
    for weights in ([0.5, 0.2, 0.3], [0.0, 1.0, 0.0]):
        assert merge(deltas, weights, method, options, SEEDS).tolist() == torch.zeros(6, 7).tolist()


@pytest.mark.parametrize(("method", "options"), CASES)
def test_task_vectors_of_zero_give_zero(deltas, method, options):
    zeros = [torch.zeros(6, 7)] * 3
    assert merge(zeros, [0.5, 0.2, 0.3], method, options, SEEDS).tolist() == zeros[0].tolist()


# tsv takes equal directions for interference (a test of its own); sce selects by what differs: where nothing does, all is.
AGREEING = [(name, options) for name, options in CASES if name != "tsv" and (name != "sce" or options["density"] == 1)]


@pytest.mark.parametrize(("method", "options"), AGREEING)
def test_policies_that_are_the_same_are_merged_as_one(deltas, method, options):
    same, seeds = [deltas[0]] * 3, [SEEDS[0]] * 3
    expected = merge(same, [1.0, 0.0, 0.0], method, options, seeds)
    torch.testing.assert_close(merge(same, [0.5, 0.2, 0.3], method, options, seeds), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "options"), CASES)
def test_task_vectors_are_left_as_they_are(deltas, method, options):
    before = [delta.clone() for delta in deltas]
    merge(deltas, [0.5, 0.2, 0.3], method, options, SEEDS)
    assert all(torch.equal(delta, kept) for delta, kept in zip(deltas, before, strict=True))


@pytest.mark.parametrize(("method", "options"), [case for case in CASES if not METHODS[case[0]].seeded])
def test_pieces_make_no_difference(deltas, method, options, monkeypatch):
    expected = merge(deltas, [0.5, 0.2, 0.3], method, options)
    monkeypatch.setattr("peft_hoe.experts.pieces.PIECE", 5)
    torch.testing.assert_close(merge(deltas, [0.5, 0.2, 0.3], method, options), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("method", "options"), [case for case in CASES if METHODS[case[0]].seeded])
def test_the_seed_of_a_policy_decides_and_the_global_generator_is_left_alone(deltas, method, options):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    first, second, other = (merge(deltas, [1, 1, 1], method, options, seeds) for seeds in (SEEDS, SEEDS, [1, 2, 3]))
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, second)
    assert torch.equal(first, other) is (options["density"] == 1)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("slerp", {}, "merge method is 'slerp'; use one of 'breadcrumbs', 'dare'"),
        ("ties", {"gamma": 1}, r"merge 'ties' has no option \['gamma'\]; it has \['density'\]"),
        ("linear", {"density": 1}, r"merge 'linear' has no option \['density'\]; it has none"),
        ("ties", {"density": 1.2}, "merge option density is 1.2; it must be a number from 0 to 1"),
        ("ties", {"density": "x"}, "merge option density is 'x'"),
        ("ties", {"density": True}, "merge option density is True"),
    ],
)
def test_unknown_methods_and_options_are_named(method, options, message):
    with pytest.raises(ExpertError, match=message):
        check_merge(method, options)


def test_a_method_is_added_in_one_place(llama, policies, tmp_path, tiny, monkeypatch, capsys):
    """`METHODS` has it: a build, its plan and the command line need no more."""

    def first(deltas, weights, *, share):
        return deltas[0] * share

    monkeypatch.setitem(METHODS, "first", MergeMethod(first, {"share": 0.5}, "nobody"))
    paths = [part for name, path in policies.items() for part in ("--policy", f"{name}={path}")]
    options = [
        "--merge",
        "first",
        "--merge-option",
        "share=0.25",
        "--rank",
        "full",
        "--rescale",
        "none",
        "--prune",
        "none",
    ]
    assert main(["merges"]) == 0
    assert any(line.split()[:2] == ["first", "share=0.5"] for line in capsys.readouterr().out.splitlines())
    assert main(["plan", str(llama), *paths, *options]) == 0
    assert main(["build", str(llama), *paths, *options, "--output", str(tmp_path / "out"), "--quiet"]) == 0
    name = "model.layers.0.mlp.up_proj"
    before, after = (tiny.tensors_of(path)[f"{name}.weight"] for path in (llama, policies["kind"]))
    torch.testing.assert_close(tiny.delta(tmp_path / "out", name, 2), 0.25 * (after - before), atol=1e-5, rtol=1e-4)


def test_the_page_on_building_lists_every_method_with_its_defaults():
    page = (Path(__file__).resolve().parents[3] / "docs" / "build.md").read_text(encoding="utf-8")
    rows = {
        found[1]: found[2] for found in re.finditer(r'^\| `"(\w+)"`(?: \(default\))? \| (.*?) \|', page, re.MULTILINE)
    }
    written = {
        name: ", ".join(f"`{option}={value:g}`" for option, value in method.options.items()) or "none"
        for name, method in METHODS.items()
    }
    assert rows == written


def test_every_method_says_where_it_is_from():
    assert all("arXiv" in method.source for method in METHODS.values())
