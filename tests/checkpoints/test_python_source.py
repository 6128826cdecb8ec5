"""Casts to half precision are found in the syntax tree, however they are spelled, and nowhere else."""

import ast

import pytest

from glmtrt_helpers.checkpoints.python_source import half_casts, parse_source

HEAD = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n"


def found(code: str) -> list[str]:
    return [ast.unparse(cast) for cast in half_casts(parse_source(HEAD + code))]


@pytest.mark.parametrize(
    "cast",
    [
        "x.half()",
        "torch.Tensor.half(x)",
        "F.softmax(x, dim=-1).half()",
        "x.to(torch.half)",
        "x.to(torch.float16)",
        "x.to('cpu', torch.float16)",
        "x.to(dtype=torch.float16)",
        "x.type(torch.float16)",
        "x.type(torch.HalfTensor)",
        "x.type(torch.cuda.HalfTensor)",
        "x.type('torch.HalfTensor')",
        "F.softmax(x, -1, dtype=torch.half)",
        "x.to(LATER)",
        "x.to(self.kept)",
        "x . half (\n )",
    ],
)
def test_every_spelling_of_a_cast(cast: str) -> None:
    after = "LATER = torch.float16\nclass M:\n    def __init__(self):\n        self.kept = torch.half\n"
    expected = [ast.unparse(ast.parse(cast))]
    assert found(f"def attention_fn(self, x):\n    return {cast}\n{after}") == expected
    assert found(f"class M:\n    def f(self, x):\n        for _ in x:\n            y = [{cast}]\n{after}") == expected
    assert found(f"class M:\n    def __init__(self):\n        self.act = lambda x: {cast}\n{after}") == expected
    assert (
        found(f"def f(self, x):\n    def g(x):\n        if x is None:\n            return {cast}\n{after}") == expected
    )


def test_names_from_an_import() -> None:
    assert found("from torch import float16 as f\ndef g(x): return x.to(f)\n") == ["x.to(f)"]
    assert found("import torch as t\ndef g(x): return x.type(t.half)\n") == ["x.type(t.half)"]
    assert found("def g(x):\n    from torch import half\n    return x.to(half)\n") == ["x.to(half)"]


@pytest.mark.parametrize(
    "code",
    [
        "# x.half()\ndef f(x):\n    '''Casts with .half().'''\n    return '.half()', x.type('half')  # x.half()\n",
        "class R:\n    def __init__(self):\n        self.inv_freq = torch.arange(2).half()\n",
        "class M:\n    def get_prompt(self, x, dtype=torch.half):\n        return self.prefix_encoder(x).half()\n",
        "def f(x, dtype=torch.half):\n    return x.to(dtype), x.to(torch.float32), x.type_as(x), x.to(x.half)\n",
        "def f(x):\n    return x.half() if x.dtype == torch.float16 else x.float()\n",
        "def f(x):\n    if torch.half == x.dtype:\n        x = x.half()\n    return x.to(half)\n",
        "kind = torch.half\ndef f(x, kind):\n    return x.to(kind)\n",
        "kind = torch.half\ndef f(x):\n    kind = x.dtype\n    return x.to(kind)\n",
        "def f(x):\n    dtype = torch.half\n    return dtype\ndef g(x):\n    return x.to(dtype)\n",
        "scale = torch.ones(1).half()\ndef f(x):\n    return torch.zeros(1, dtype=torch.half), config.half\n",
    ],
)
def test_what_is_no_cast_of_the_forward(code: str) -> None:
    assert found(code) == []
