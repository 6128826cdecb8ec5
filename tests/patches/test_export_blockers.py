"""Blockers are found and patched by structure: in a fork with other names and layout; ambiguous code is refused."""

import re
from typing import Any

import pytest
import torch

from glmtrt_helpers.core.errors import WorkbookError
from glmtrt_helpers.patches import patching

# The four structures as a fork may write them: other names, indentation and line breaks, statements on one line.
FORK = '''\
import torch
import torch.nn.functional as nnf
from torch.utils.checkpoint import checkpoint

class Rope(torch.nn.Module):
  def __init__(self, dim, precision = torch.half, learnable = False):
    super().__init__()
    inv_freq = (1. / (10000 ** (torch.arange(0, dim, 2).float() / dim))).half()
    self.learnable, self.precision = learnable, precision
    if learnable:
      self.inv_freq = torch.nn.Parameter(inv_freq)
    else:
      self.register_buffer('inv_freq', inv_freq)
    self.longest = self.cos_kept = self.sin_kept = None

  def forward(self, x, axis=1, rows=None):
    """Tables of the two halves."""
    if rows is None: rows = x.shape[axis]
    # grow
    if (self.longest is None
        or rows > self.longest):   # longer than ever
      self.longest = None if self.learnable else rows
      # count
      steps = torch.arange(rows, dtype=self.inv_freq.dtype,
                           device=x.device)
      angle = torch.einsum('i,j->ij', steps, self.inv_freq)
      emb = torch.cat((angle, angle), dim=-1).to(x.device)
      if self.precision == torch.bfloat16:
        emb = emb.float()
      cos_kept, sin_kept = emb.cos()[:, None, :], emb.sin()[:, None, :]
      if self.precision == torch.bfloat16:
        cos_kept, sin_kept = cos_kept.bfloat16(), sin_kept.bfloat16()
      if self.learnable: return cos_kept, sin_kept
      self.cos_kept, self.sin_kept = cos_kept, sin_kept
      # grown
    return self.cos_kept[:rows, ...], self.sin_kept[:rows, ...]

  def _apply(self, fn):
    if self.cos_kept is not None: self.cos_kept = fn(self.cos_kept)
    if self.sin_kept is not None: self.sin_kept = fn(self.sin_kept)
    return super()._apply(fn)

def turn(q, where, c, s):
  c = nnf.embedding(where,
                    c.squeeze( dim = 1 )).unsqueeze(2); s = nnf.embedding(where, weight=s . squeeze(1)).unsqueeze(2)
  return q * c + q * s

def attend(self, scores, hidden):
  if self.fused: return fused_softmax(scores, hidden)
  if not ((hidden == 0)
          .all()): scores = scores.masked_fill(hidden, -10000.0)
  return nnf.softmax(scores, dim=-1)

class Stack(torch.nn.Module):
  def forward(self, h):
    for number, block in enumerate(self.blocks):
      if self.training: h = checkpoint(block, h, torch.tensor(number), None)
      else: h = block(h, layer_id = torch.tensor( number ), past=None)
    return h
'''

FORK_PATCHED_FORWARD = '''\
  def forward(self, x, axis=1, rows=None):
    """Tables of the two halves."""
    rows = 512  # the checkpoint's max_sequence_length, regardless of the argument
    # grow
    # longer than ever
    # count
    steps = torch.arange(rows, device=x.device).to(self.inv_freq.dtype)
    angle = torch.einsum('i,j->ij', steps, self.inv_freq)
    emb = torch.cat((angle, angle), dim=-1).to(x.device)
    if self.precision == torch.bfloat16:
      emb = emb.float()
    cos_kept, sin_kept = emb.cos()[:, None, :], emb.sin()[:, None, :]
    if self.precision == torch.bfloat16:
      cos_kept, sin_kept = cos_kept.bfloat16(), sin_kept.bfloat16()
    if self.learnable: return cos_kept, sin_kept
    # grown
    return cos_kept, sin_kept
'''

ALL = [patch.name for patch in patching.PATCHES]


# What each patch changes in the fork: (before, after).
CHANGES = {
    "rotary_flatten": [("c.squeeze( dim = 1 )", "c.flatten( 1, 2)"), ("s . squeeze(1)", "s . flatten(1, 2)")],
    "integer_layer_id": [("h, torch.tensor(number)", "h, number"), ("= torch.tensor( number )", "= number")],
    "unconditional_mask_fill": [("if not ((hidden == 0)\n          .all()): scores =", "scores =")],
    "fixed_rotary_table": [
        (FORK[FORK.index("  def forward(self, x") : FORK.index("\n  def _apply")], FORK_PATCHED_FORWARD)
    ],
}


def edited(source: str, *changes: tuple[str, str]) -> str:
    for before, after in changes:
        assert source.count(before) == 1, before
        source = source.replace(before, after)
    return source


def run(source: str, name: str) -> Any:
    namespace: dict[str, Any] = {}
    exec(compile(source, "fixture", "exec"), namespace)
    return namespace[name]


def states(source: str) -> dict[str, str]:
    return {name: blocker.state for name, blocker in patching.find_blockers(source).items()}


def test_finds_the_blockers_of_a_fork_and_their_lines() -> None:
    lines = FORK.splitlines()
    blockers = patching.find_blockers(FORK)
    assert states(FORK) == dict.fromkeys(ALL, "unpatched")
    for name, words in {
        "rotary_flatten": ["c = nnf.embedding", "weight=s . squeeze"],
        "integer_layer_id": ["torch.tensor(number)", "torch.tensor( number )"],
        "unconditional_mask_fill": ["if not ((hidden == 0)"],
        "fixed_rotary_table": ["if (self.longest is None", "steps = torch.arange(rows"],
    }.items():
        assert len(blockers[name].sites) == len(words)
        for site, word in zip(blockers[name].sites, words, strict=True):
            assert word in site.text and lines[site.line - 1].strip() == site.text


@pytest.mark.parametrize("name", ALL)
def test_each_patch_alone_changes_its_statements_and_nothing_else(name: str) -> None:
    expected = edited(FORK, *CHANGES[name])
    assert patching.patch_source(FORK, 512, only=[name]) == expected
    assert patching.patch_source(expected, 512, only=[name]) == expected
    assert states(expected) == {other: "patched" if other == name else "unpatched" for other in ALL}


def test_all_patches_and_again_change_nothing_more() -> None:
    expected = edited(FORK, *(change for changes in CHANGES.values() for change in changes))
    assert patching.patch_source(FORK, 512) == expected
    assert patching.patch_source(expected, 512) == expected
    assert states(expected) == dict.fromkeys(ALL, "patched")


@pytest.mark.parametrize("name", ALL)
def test_a_half_patched_source_gets_the_rest(name: str) -> None:
    half = patching.patch_source(FORK, 512, only=[name])
    assert patching.patch_source(half, 512) == patching.patch_source(FORK, 512)


def test_one_patched_table_of_two_is_still_a_blocker() -> None:
    half = edited(FORK, CHANGES["rotary_flatten"][0])
    blocker = patching.find_blockers(half)["rotary_flatten"]
    assert blocker.state == "unpatched" and len(blocker.sites) == 1
    assert patching.patch_source(half, 512) == patching.patch_source(FORK, 512)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("learnable", [False, True])
def test_the_fixed_table_is_bit_for_bit_the_one_upstream_caches(dtype: torch.dtype, learnable: bool) -> None:
    """At 2048 rows in half precision too, where bfloat16 can no longer tell neighbouring integers apart."""
    before, after = (
        run(source, "Rope")(64, precision=dtype, learnable=learnable).to(dtype)
        for source in (FORK, patching.patch_source(FORK, 2048, only=["fixed_rotary_table"]))
    )
    x = torch.zeros(1, 3)
    for expected, fixed in zip(before(x, rows=2048), after(x, rows=torch.tensor(7)), strict=True):
        assert fixed.dtype == expected.dtype and fixed.shape == (2048, 1, 64) and torch.equal(fixed, expected)
    assert (after.longest, after.cos_kept, after.sin_kept) == (None, None, None)
    if not learnable:
        assert torch.equal(before(x, rows=9)[0], after(x)[0][:9])
    assert after.to(torch.float32)(x)[0].shape == (2048, 1, 64)  # _apply still finds its attributes


def test_a_fill_in_place_stays_in_place_and_the_rest_of_its_branch_is_kept() -> None:
    source = edited(
        FORK,
        (
            "  if not ((hidden == 0)\n          .all()): scores = scores.masked_fill(hidden, -10000.0)\n",
            "  if self.eager:\n    pass\n  else:\n"
            "    if torch.any(hidden):\n        # skip\n        hidden = hidden.bool()\n"
            "        scores.masked_fill_(hidden, -10000.0)\n    scores = scores.float()\n",
        ),
    )
    expected = edited(
        source,
        (
            "    if torch.any(hidden):\n        # skip\n        hidden = hidden.bool()\n        scores.masked",
            "    # skip\n    hidden = hidden.bool()\n    scores.masked",
        ),
    )
    assert patching.patch_source(source, 512, only=["unconditional_mask_fill"]) == expected


def test_a_table_that_is_built_on_each_call_only_gets_a_fixed_length() -> None:
    """A fork in which only the length is remembered in the branch."""
    start, end = FORK.index("      # count"), FORK.index("      # grown\n")
    inside = FORK[start:end].replace("\n      ", "\n    ").replace("      # count", "    # count")
    source = FORK[:start] + inside + FORK[end:].replace("      # grown", "    # grown")
    patched = patching.patch_source(source, 512, only=["fixed_rotary_table"])
    assert patched == patching.patch_source(FORK, 512, only=["fixed_rotary_table"])


# A construct, what a fork wrote instead, and words of the refusal.
REFUSED = {
    "other axis": ("s . squeeze(1)", "s.squeeze(0)", "squeeze(1) inside F.embedding is not written as"),
    "no axis": ("s . squeeze(1)", "s.squeeze()", "is not written as"),
    "flatten elsewhere": ("s . squeeze(1)", "s.flatten(0, 1)", "is not written as"),
    "axis not given": ("s . squeeze(1)", "torch.squeeze(s)", "is not written as"),
    "other number": (
        "layer_id = torch.tensor( number )",
        "layer_id=torch.tensor(self.n)",
        "is not made of the index",
    ),
    "number on the GPU": (
        "layer_id = torch.tensor( number )",
        "layer_id=torch.tensor(number).cuda()",
        "is not made of the index",
    ),
    "else": ("  return nnf.softmax", "  else: scores = scores * 2\n  return nnf.softmax", "has an else"),
    "other condition": (
        "not ((hidden == 0)\n          .all())",
        "not (hidden == 0).all() and self.strict",
        "another condition",
    ),
    "condition in a variable": (
        "if not ((hidden == 0)\n          .all())",
        "some = hidden.any()\n  if some",
        "another condition",
    ),
    "two conditions": (
        "  if not ((hidden == 0)\n          .all()):",
        "  if hidden.any():\n   if hidden.any():",
        "another condition",
    ),
    "return beside it": (
        "masked_fill(hidden, -10000.0)",
        "masked_fill(hidden, -10000.0); return scores",
        "return, raise",
    ),
    "uint8 mask": ("masked_fill(hidden, ", "masked_fill(hidden.byte(), ", "uint8"),
    "uint8 by dtype": ("masked_fill(hidden, ", "masked_fill(hidden.to(torch.uint8), ", "uint8"),
    "table read outside": ("return q * c + q * s", "return q * rope.cos_kept", "read outside its class"),
    "branch with else": (
        "    return self.cos_kept[",
        "    else: pass\n    return self.cos_kept[",
        "in another way than upstream",
    ),
    "inverse branch": (
        "    # grow\n",
        "    if self.longest is not None: return self.cos_kept, self.sin_kept\n",
        "in another way than upstream",
    ),
    "count from 0": ("torch.arange(rows, ", "torch.arange(0, rows, ", "arange(length, ...)"),
    "length made elsewhere": ("torch.arange(rows, ", "torch.arange(self.longest, ", "arange(length, ...)"),
    "length set again": ("      # count\n", "      rows = rows + 1\n", "a form here that this workbook cannot patch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_ambiguous_code_is_refused_with_its_line(case: str) -> None:
    before, after, words = REFUSED[case]
    source = edited(FORK, (before, after))
    with pytest.raises(WorkbookError, match=re.escape(words)) as refusal:
        patching.patch_source(source, 512)
    line = int(re.match(r"line (\d+): ", str(refusal.value)).group(1))  # type: ignore[union-attr]
    assert source.splitlines()[line - 1].strip() in str(refusal.value)


def test_refuses_two_rotary_classes_and_names_both() -> None:
    twice = FORK + "\n" + FORK[FORK.index("class Rope") : FORK.index("def turn")]
    with pytest.raises(WorkbookError, match=r"line 61: .* occurs twice, first in line 5"):
        patching.patch_source(twice, 512)


def test_refuses_a_patched_table_of_another_length() -> None:
    patched = patching.patch_source(FORK, 512)
    with pytest.raises(WorkbookError, match=r"line 18: .* 1024, rows; restore and patch again \(rows = 512"):
        patching.patch_source(patched, 1024)


@pytest.mark.parametrize(
    ("marker", "family"),
    [
        ("class GLMTransformer: pass", "ChatGLM2"),
        ("x.multi_query_attention", "ChatGLM3"),
        ("def image_encoder(): pass", "VisualGLM"),
        ("def forward(full_attention_mask=None): pass", "the dev_mask branch"),
    ],
)
def test_refuses_other_families_by_name(marker: str, family: str) -> None:
    with pytest.raises(WorkbookError, match=rf"line 2: .*{family}"):
        patching.patch_source(f"import torch\n{marker}\n{FORK}", 512)


@pytest.mark.parametrize("name", ALL)
def test_an_absent_construct_is_refused_by_name_unless_harmless(name: str) -> None:
    without = {
        "rotary_flatten": FORK.replace("embedding", "lookup"),
        "integer_layer_id": FORK.replace("torch.tensor(number)", "0").replace(
            "layer_id = torch.tensor( number )", "at=0"
        ),
        "unconditional_mask_fill": FORK.replace("masked_fill", "hide"),
        "fixed_rotary_table": FORK.replace("arange(rows", "count(rows"),
    }[name]
    assert states(without)[name] == "absent"
    if name in patching.HARMLESS_IF_ABSENT:
        assert name == "integer_layer_id" and "arange(rows, device" in patching.patch_source(without, 512)
    else:
        with pytest.raises(WorkbookError, match=rf"neither present nor patched \({name}\)"):
            patching.patch_source(without, 512)


LOOP = FORK[FORK.index("    for number, block") : FORK.index("    return h\n")]


@pytest.mark.parametrize(
    "call",
    ["self.blocks[number](h, layer_id={})", "checkpoint(self.blocks[number], h, {}, None)", "go(h, layer_id={})"],
)
def test_a_layer_id_from_a_range_is_a_blocker_too(call: str) -> None:
    line = "    for number in range(len(self.blocks)):\n      h = " + call + "\n"
    source = edited(FORK, (LOOP, line.format("torch.tensor(number)")))
    assert states(source)["integer_layer_id"] == "unpatched"
    patched = patching.patch_source(source, 512, only=["integer_layer_id"])
    assert patched == edited(FORK, (LOOP, line.format("number")))
    assert states(patched)["integer_layer_id"] == "patched"


def test_a_range_over_something_else_and_a_tensor_without_a_value_stay() -> None:
    alike = "def count(x):\n    for n in range(3):\n        keep(x, torch.tensor(n), torch.tensor())\n"
    assert patching.patch_source(FORK + alike, 512) == patching.patch_source(FORK, 512) + alike


def test_code_that_only_looks_alike_stays() -> None:
    """A squeeze outside an embedding, a tensor of another loop, a fill outside attention, a branch on a flag."""
    alike = (
        "def loss(x, mask, i):\n    for i, row in enumerate(x):\n        keep(torch.tensor(i), x.squeeze(1))\n"
        "    if mask.any():\n        x.masked_fill_(mask, -1.0)\n    return torch.arange(3, dtype=torch.half)\n"
    )
    assert patching.patch_source(FORK + alike, 512) == patching.patch_source(FORK, 512) + alike
    flagged = edited(FORK, ("if not ((hidden == 0)\n          .all())", "if hidden is not None"))
    assert states(flagged)["unconditional_mask_fill"] == "patched"


def test_unknown_patch_names_the_known_ones() -> None:
    with pytest.raises(WorkbookError, match=r"no patch 'flatten': choose from rotary_flatten, integer_layer_id"):
        patching.patch_source(FORK, 512, only=["flatten"])
