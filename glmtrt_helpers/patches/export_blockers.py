"""The four export blockers of ChatGLM-6B's source: how each is found in the syntax tree, and how it is patched.

They are found by structure, because line numbers, layout and names of variables differ between revisions and forks.
Ambiguous code is refused. The author's comments stay, even those that explain the blocker.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import libcst as cst
from libcst import matchers as m

from glmtrt_helpers.patches.source_tree import Edits, Site, Source, begin_with, callee, keyword, parameters, text

UNPATCHED, PATCHED, ABSENT = "unpatched", "patched", "absent"
# What each blocker is called in an error.
CONSTRUCTS = {
    "rotary_flatten": "the rotary tables' squeeze(1) inside F.embedding",
    "integer_layer_id": "the argument layer_id",
    "unconditional_mask_fill": "the mask fill under `if not (attention_mask == 0).all()`",
    "fixed_rotary_table": "the table in RotaryEmbedding.forward",
}
# Names that only other families use, looked for in this order: their code has other blockers, or other inputs.
_FAMILIES = {
    "multi_query_attention": "ChatGLM2, ChatGLM3 or GLM-4",
    "GLMTransformer": "ChatGLM2, ChatGLM3 or GLM-4",
    "image_encoder": "VisualGLM",
    "full_attention_mask": "the dev_mask branch, whose attention_mask says which tokens are padding",
}


@dataclass(frozen=True)
class Blocker:
    """One blocker: 'unpatched' if any site still has it, 'patched' or 'absent', and the sites in that state."""

    state: str
    sites: tuple[Site, ...]


def inspect_blocker(source: Source, name: str, edits: Edits, max_length: int) -> Blocker:
    """State of one blocker; what would patch it is added to the edits.

    max_length: rows of the rotary tables, 0 where nothing is patched. Raises WorkbookError, naming line and construct,
    for the source of another model and for ambiguous code.
    """
    words = {word.value: word for word in source.find(cst.Name) if word.value in _FAMILIES}
    for name_of_family in (name for name in _FAMILIES if name in words):
        source.refuse(words[name_of_family], f"this is the source of {_FAMILIES[name_of_family]}, not of ChatGLM-6B")
    unpatched, patched = _INSPECTORS[name](source, edits, max_length)
    state = UNPATCHED if unpatched else PATCHED if patched else ABSENT
    return Blocker(state, tuple(sorted(unpatched or patched)))


Sites = tuple[set[Site], set[Site]]  # unpatched, patched


def _rotary_flatten(source: Source, edits: Edits, max_length: int) -> Sites:
    """`F.embedding(position_id, cos.squeeze(1))` -> `F.embedding(position_id, cos.flatten(1, 2))`.

    Also torch.squeeze(cos, 1). Patched by others it may be torch.flatten(cos, start_dim=1, end_dim=2).
    """
    unpatched, patched = set(), set()
    for call in source.find(cst.Call):
        tables = [a.value for i, a in enumerate(call.args) if keyword(a) == "weight" or (i == 1 and not a.keyword)]
        if callee(call) != "embedding" or not tables:
            continue
        table = tables[0]
        axes = [text(a.value) for a in getattr(table, "args", ()) if isinstance(a.value, cst.Integer)]
        if callee(table) == "squeeze" and axes == ["1"]:
            unpatched.add(source.site(call))
            edits.rewrites[table] = _flatten
        elif callee(table) == "flatten" and axes == ["1", "2"]:
            patched.add(source.site(call))
        elif source.names(table) & {"squeeze", "flatten"}:
            source.refuse(call, f"{CONSTRUCTS['rotary_flatten']} is not written as table.squeeze(1)")
    return unpatched, patched


def _flatten(squeeze: cst.Call) -> cst.Call:
    func = cst.ensure_type(squeeze.func, cst.Attribute).with_changes(attr=cst.Name("flatten"))
    table = [arg for arg in squeeze.args if not isinstance(arg.value, cst.Integer)]
    return squeeze.with_changes(func=func, args=[*table, cst.Arg(cst.Integer("1")), cst.Arg(cst.Integer("2"))])


def _integer_layer_id(source: Source, edits: Edits, max_length: int) -> Sites:
    """`layer(..., layer_id=torch.tensor(i))` -> `layer(..., layer_id=i)` for the i of `for i, layer in enumerate(...)`.

    Also as a positional argument, `checkpoint(layer, ..., torch.tensor(i), ...)`, and for the i of `range(...)` where
    self.layers[i] is called.
    """
    unpatched, patched = set(), set()
    for call in source.find(cst.Call):
        suspects = [arg for arg in call.args if _may_be_layer_id(arg)]
        indexes = _layer_indexes(source, call) if suspects else set()
        for arg in suspects:
            value = arg.value
            if isinstance(value, cst.Name) and value.value in indexes:
                patched.add(source.site(arg))
            elif callee(value) == "tensor" and _first_argument(value) in indexes:
                unpatched.add(source.site(arg))
                edits.rewrites[value] = lambda tensor: tensor.args[0].value
            elif keyword(arg) == "layer_id" and "tensor" in text(value).lower():
                why = "is not made of the index of a loop over the layers"
                source.refuse(arg, f"{CONSTRUCTS['integer_layer_id']} {why}")
    return unpatched, patched


def _may_be_layer_id(arg: cst.Arg) -> bool:
    """Whether an argument may be a layer_id: one called so, or a positional name or torch.tensor(...)."""
    positional = arg.keyword is None and arg.star == ""
    return keyword(arg) == "layer_id" or (
        positional and (isinstance(arg.value, cst.Name) or callee(arg.value) == "tensor")
    )


def _layer_indexes(source: Source, call: cst.Call) -> set[str]:
    """Names of the loop variables that number the layer which a call runs."""
    names = source.names(call)
    indexes = {index for index, layer in _enumerations(source, call) if layer in names}
    return indexes | {index for index in _ranges(source, call) if _uses_layer(source, call, index)}


def _enumerations(source: Source, node: cst.CSTNode) -> list[tuple[str, str]]:
    """Names of (index, item) of the loops `for index, item in enumerate(...)` around a node."""
    pair = m.Tuple([m.Element(m.Name()), m.Element(m.Name())])
    loops = [loop for loop in source.around(node) if m.matches(loop, m.For(pair, m.Call(m.Name("enumerate"))))]
    return [
        (index.value, item.value)
        for index, item in (source.find(cst.Name, cst.ensure_type(loop, cst.For).target) for loop in loops)
    ]


def _first_argument(call: cst.BaseExpression) -> str:
    args = cst.ensure_type(call, cst.Call).args
    return text(args[0].value) if args else ""


def _ranges(source: Source, node: cst.CSTNode) -> list[str]:
    """Names of the index of the loops `for index in range(...)` around a node."""
    loops = [loop for loop in source.around(node) if m.matches(loop, m.For(m.Name(), m.Call(m.Name("range"))))]
    return [text(cst.ensure_type(loop, cst.For).target) for loop in loops]


def _uses_layer(source: Source, call: cst.Call, index: str) -> bool:
    """Whether a call selects its layer by a loop's index, as self.layers[i], or has an argument layer_id."""
    selected = any(index in source.names(part) for item in source.find(cst.Subscript, call) for part in item.slice)
    return selected or any(keyword(arg) == "layer_id" for arg in call.args)


def _unconditional_mask_fill(source: Source, edits: Edits, max_length: int) -> Sites:
    """`if not (mask == 0).all(): scores.masked_fill_(mask, -10000.0)` -> its body, all of it."""
    unpatched, patched = set(), set()
    for call in source.find(cst.Call):
        function = next((f for f in source.around(call) if isinstance(f, cst.FunctionDef)), None)
        if callee(call) not in ("masked_fill", "masked_fill_") or len(call.args) != 2 or function is None:
            continue
        # Attention fills scores and then takes their softmax; other fills do not matter here.
        if "softmax" not in source.names(function):
            continue
        mask = call.args[0].value
        if "byte" in text(mask) or "uint8" in text(mask):
            source.refuse(
                call, "this mask fill takes a uint8 mask, which torch no longer accepts; use one with .bool()"
            )
        inside = set(source.find(cst.If, function))
        branches = [b for b in source.around(call) if isinstance(b, cst.If) and b in inside]
        dependent = [branch for branch in branches if not _is_static(branch.test, function)]
        for branch in dependent:
            _check_mask_branch(source, branch, {text(mask), *source.names(mask)}, len(dependent))
            unpatched.add(source.site(branch))
            edits.unwrapped.add(branch)
        if not dependent:
            patched.add(source.site(call))
    return unpatched, patched


def _check_mask_branch(source: Source, branch: cst.If, masks: set[str], depth: int) -> None:
    construct = CONSTRUCTS["unconditional_mask_fill"]
    if depth > 1 or not any(text(branch.test) in _mask_tests(mask) for mask in masks):
        source.refuse(branch, f"{construct} has another condition")
    if branch.orelse is not None:
        source.refuse(branch, f"{construct} has an else, which would never run once patched")
    if any(source.find(kind, branch.body) for kind in (cst.Return, cst.Raise, cst.Break, cst.Continue)):
        source.refuse(
            branch, f"{construct} has a return, raise, break or continue beside it, which would then always run"
        )


def _is_static(test: cst.BaseExpression, function: cst.FunctionDef) -> bool:
    """Whether a condition depends on no tensor's values: an attribute of self, `x is None`, or a function's flag."""
    condition = text(test).removeprefix("not ")
    return bool(re.fullmatch(r"self\.\w+|\w+ is (not )?None", condition)) or condition in parameters(function)


def _mask_tests(mask: str) -> set[str]:
    """The conditions that ask whether a mask hides anything."""
    hides = (f"({mask} != 0).any()", f"torch.any({mask} != 0)", f"{mask}.any()", f"torch.any({mask})")
    return {f"not ({mask} == 0).all()", f"not torch.all({mask} == 0)", *hides}


def _fixed_rotary_table(source: Source, edits: Edits, max_length: int) -> Sites:
    """RotaryEmbedding.forward builds max_length rows on each call, by its own arithmetic, and stores nothing on self.

    The length is overwritten at the top; what was stored on self becomes local and the branch around it is removed;
    arange counts in integers and is cast to the dtype that it counted in, which gives the same numbers.
    """
    construct = CONSTRUCTS["fixed_rotary_table"]
    classes = [(c, f) for c in source.find(cst.ClassDef) if (f := _table_forward(source, c)) is not None]
    if not classes:
        return set(), set()
    owner, forward = classes[0]
    if len(classes) > 1:
        source.refuse(classes[1][0], f"{construct} occurs twice, first in line {source.site(owner).line}")
    arange = next(call for call in source.find(cst.Call, forward) if callee(call) == "arange")
    rows = text(arange.args[0].value) if arange.args else ""
    if any(arg.keyword is None for arg in arange.args[1:]) or rows not in parameters(forward):
        source.refuse(arange, f"{construct} does not use arange(length, ...) with a parameter of forward")
    stored = {
        attribute
        for target in source.find(cst.AssignTarget, forward)
        for attribute in source.find(cst.Attribute, target)
        if text(attribute.value) == "self"
    }
    if not stored and (length := _fixed_length(source, forward, arange, rows)):
        if max_length not in (0, int(length.value)):
            why = f"does not have max_sequence_length, {max_length}, rows; restore and patch again"
            source.refuse(length, f"{construct} {why}")
        return set(), {source.site(length), source.site(arange)}
    names = {attribute.attr.value for attribute in stored}
    outside = set(source.find(cst.Attribute)) - set(source.find(cst.Attribute, owner))
    for attribute in sorted((a for a in outside if a.attr.value in names), key=source.site):
        source.refuse(attribute, f"{construct} is read outside its class")
    comment = "the checkpoint's max_sequence_length, regardless of the argument"
    edits.rewrites[forward] = lambda function: begin_with(function, f"{rows} = {max_length}  # {comment}")
    edits.rewrites[arange] = _count_in_integers
    branches = _unwrap_cache(source, edits, forward, rows, stored)
    _make_local(source, edits, forward, rows, stored)
    return {source.site(arange), *branches}, set()


def _table_forward(source: Source, owner: cst.ClassDef) -> cst.FunctionDef | None:
    """The `forward` of a class that builds a table of cosines with arange, or None."""
    for function in source.find(cst.FunctionDef, owner):
        called = {callee(call) for call in source.find(cst.Call, function)}
        if function.name.value == "forward" and {"arange", "cos"} <= called:
            return function
    return None


def _fixed_length(source: Source, forward: cst.FunctionDef, arange: cst.Call, rows: str) -> cst.Integer | None:
    """The number of rows that a patched `forward` sets, or None in one that is not patched."""
    lengths = [s.value for s in source.find(cst.Assign, forward) if text(s.targets[0].target) == rows]
    has_dtype = any(keyword(arg) == "dtype" for arg in arange.args)
    return lengths[0] if len(lengths) == 1 and isinstance(lengths[0], cst.Integer) and not has_dtype else None


def _unwrap_cache(
    source: Source, edits: Edits, forward: cst.FunctionDef, rows: str, stored: set[cst.Attribute]
) -> set[Site]:
    """Replace the branch that builds the table only when it must by its body; returns where it stands."""
    sites = set()
    for branch in source.find(cst.If, forward):
        if text(branch.test) == f"{rows} is None":
            edits.dropped.add(branch)
        elif {a.attr.value for a in source.find(cst.Attribute, branch.test)} & {a.attr.value for a in stored}:
            if branch.orelse is not None or not stored & set(source.find(cst.Attribute, branch.body)):
                source.refuse(
                    branch, f"{CONSTRUCTS['fixed_rotary_table']} is cached in another way than upstream caches it"
                )
            edits.unwrapped.add(branch)
            sites.add(source.site(branch))
    return sites


def _make_local(source: Source, edits: Edits, forward: cst.FunctionDef, rows: str, stored: set[cst.Attribute]) -> None:
    """Turn what is stored on self into local variables, and drop the statements that have no use then."""
    names = {attribute.attr.value for attribute in stored}
    uses = {a for a in source.find(cst.Attribute, forward) if text(a.value) == "self" and a.attr.value in names}
    edits.rewrites |= dict.fromkeys(uses, lambda attribute: attribute.attr)
    tests = [cst.ensure_type(branch, cst.If).test for branch in edits.unwrapped & set(source.find(cst.If, forward))]
    tested = {attribute for test in tests for attribute in source.find(cst.Attribute, test)}
    read = {attribute.attr.value for attribute in uses - stored - tested}
    for line in source.find(cst.SimpleStatementLine, forward):
        if not m.matches(line, m.SimpleStatementLine([m.Assign([m.AssignTarget()])])):
            continue
        assign = cst.ensure_type(line.body[0], cst.Assign)
        target = assign.targets[0].target
        # A length that only the branch tested, and `self.cos, self.sin = cos, sin`.
        unread = isinstance(target, cst.Attribute) and target in uses and target.attr.value not in read
        if unread or text(target).replace("self.", "") == text(assign.value):
            edits.dropped.add(line)
    for part in source.find(cst.Subscript, forward):
        if part.value in uses and text(part).endswith((f"[:{rows}, ...]", f"[:{rows}]")):
            edits.rewrites[part] = lambda whole: whole.value


def _count_in_integers(arange: cst.Call) -> cst.Call:
    """`arange(n, dtype=T)` -> `arange(n).to(T)`: the same numbers, without a Range in half precision."""
    dtypes = [arg.value for arg in arange.args if keyword(arg) == "dtype"]
    if not dtypes:
        return arange
    others = [arg for arg in arange.args if keyword(arg) != "dtype"]
    others[-1] = others[-1].with_changes(comma=cst.MaybeSentinel.DEFAULT)
    return cst.Call(cst.Attribute(arange.with_changes(args=others), cst.Name("to")), [cst.Arg(dtypes[0])])


_INSPECTORS: dict[str, Callable[[Source, Edits, int], Sites]] = {
    "rotary_flatten": _rotary_flatten,
    "integer_layer_id": _integer_layer_id,
    "unconditional_mask_fill": _unconditional_mask_fill,
    "fixed_rotary_table": _fixed_rotary_table,
}
