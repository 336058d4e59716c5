"""The choice of forms: the platform's own, and overrides that end with their block."""

import contextvars

import pytest

from vvt_jax.models import forms

_OTHER = {"shift": "grouped", "grouped": "shift"}


def _chosen():
    return forms.current().depthwise, forms.current().attention


@pytest.mark.parametrize(
    ("platform", "spatial", "expected"),
    [
        ("cpu", 1, forms.Forms("shift", "separable", "kept")),
        ("cpu", 2, forms.Forms("grouped", "concatenated", "recomputed")),
        ("tpu", 1, forms.Forms("grouped", "concatenated", "recomputed")),
        ("gpu", 4, forms.Forms("grouped", "concatenated", "recomputed")),
    ],
)
def test_choice_by_platform_and_mesh(platform, spatial, expected):
    before = forms.current()
    assert forms.choose(platform, spatial=spatial) == expected
    with forms.compiling_for(platform, spatial=spatial) as chosen:
        assert chosen == forms.current() == expected
        other = _OTHER[expected.depthwise]
        with forms.use(depthwise=other):
            assert forms.current().depthwise == other
            assert forms.current().attention == expected.attention
    assert forms.current() == before


def test_compiler_options_are_for_cpus():
    assert forms.compiler_options("forward", "cpu")
    assert all(forms.compiler_options(use, "tpu") == {} for use in ("init", "forward", "train"))


def test_override_changes_what_it_names_and_ends_with_its_block():
    before = forms.current()
    with forms.use(depthwise=_OTHER[before.depthwise]) as inside:
        assert inside == forms.current()
        assert inside.depthwise != before.depthwise
        assert inside.attention == before.attention
    assert forms.current() == before


def test_overrides_nest():
    with forms.use(depthwise="grouped", attention="separable"):
        with forms.use(attention="concatenated"):
            assert _chosen() == ("grouped", "concatenated")
            with forms.use(depthwise="shift"):
                assert _chosen() == ("shift", "concatenated")
            assert _chosen() == ("grouped", "concatenated")
        assert _chosen() == ("grouped", "separable")


def test_override_ends_where_an_exception_leaves_its_block():
    before = forms.current()
    with pytest.raises(RuntimeError), forms.use(depthwise=_OTHER[before.depthwise]):
        raise RuntimeError
    assert forms.current() == before


def test_override_is_seen_in_its_own_context_only():
    elsewhere = contextvars.copy_context()
    before = forms.current()
    with forms.use(depthwise=_OTHER[before.depthwise]):
        assert elsewhere.run(forms.current) == before


@pytest.mark.parametrize("field", ["depthwise", "attention"])
def test_unknown_form_is_refused_and_changes_nothing(field):
    before = forms.current()
    with pytest.raises(ValueError, match="Unknown form 'dense': it is one of"):
        forms.use(**{field: "dense"}).__enter__()
    assert forms.current() == before


def test_unknown_operation_is_refused():
    with pytest.raises(TypeError, match="pooling"):
        forms.use(pooling="max").__enter__()
