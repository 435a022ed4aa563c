"""Functions that do the same job have the same code in every file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CARTPOLE = "dqn_cartpole_jax"
LANDER = "dqn_lunarlander"
PENDULUM = "dqn_pendulum_discretized"
EVERYWHERE = ["BadInput", "BadRun", "Learner", "init_params", "normalize", "main"]
ON_GYMNASIUM = ["Transition", "fits", "flatten", "init_buffer", "make_optimizer", "statistics"]
ON_GYMNASIUM += ["q_values", "refuse", "report", "sample", "summarize", "warn", "wrap_env"]
SAME = [(CARTPOLE, LANDER, name) for name in EVERYWHERE]
SAME += [(LANDER, PENDULUM, name) for name in EVERYWHERE + ON_GYMNASIUM]
SAME += [(CARTPOLE, PENDULUM, "make_output_dir"), (CARTPOLE, "q_table_maze", "make_output_dir")]


def body(script, name):
    """The statements of a function or class, without its docstring and comments."""
    tree = ast.parse((ROOT / f"{script}.py").read_text(encoding="utf-8"))
    (node,) = [node for node in tree.body if getattr(node, "name", None) == name]
    statements = [ast.unparse(node.args)] if isinstance(node, ast.FunctionDef) else []
    for statement in node.body:
        if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Constant):
            statements.append(ast.unparse(statement))
    return statements


@pytest.mark.parametrize("first, second, name", SAME)
def test_the_code_is_the_same(first, second, name):
    assert body(first, name) == body(second, name)


def test_q_values_differ_only_where_cartpole_scales_its_observations():
    arguments, scaled, *rest = body(CARTPOLE, "q_values")
    other_arguments, unscaled, *other_rest = body(LANDER, "q_values")
    assert (arguments, rest) == (other_arguments, other_rest)
    assert scaled == f"{unscaled} / OBS_SCALE"
