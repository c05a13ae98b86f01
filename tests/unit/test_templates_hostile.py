"""Templates: whatever is written ends soon, in bounded memory, as a refusal or a text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpuwatch.records import Labels
from gpuwatch.rules.templates import Context, Template, TemplateError

LABELS = Labels.of("gpu_heat", gpu="0")
CONTEXT = Context(query=lambda _: [(Labels.of("up", gpu="0"), 1.0)])


def expand(template):
    return Template(template).expand(LABELS, 1.0, CONTEXT)


def refusal(template):
    with pytest.raises(TemplateError) as caught:
        Template(template)
    return caught.value


@pytest.mark.parametrize(
    "template",
    [
        "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
        "{{ if 1 }}" * 1_500 + "{{ end }}" * 1_500,
        "{{ " + "(print " * 60 + "1" + ")" * 60 + " }}",
    ],
)
def test_what_nests_too_deep_is_refused(template):
    assert refusal(template).what.startswith("nested deeper than 50")


def test_a_template_that_is_too_long_is_refused():
    assert "longer than 32768 characters" in refusal("{{ 1 }}" + "x" * 40_000).what


def test_as_many_else_ifs_as_there_are_xids_nest_nothing():
    chain = "{{ if eq $labels.gpu `x` }}" + "".join(
        f"{{{{ else if eq $labels.gpu `{n}` }}}}{n}" for n in range(99, -1, -1)
    )
    assert expand(chain + "{{ end }}") == "0"


@pytest.mark.parametrize(
    ("template", "what"),
    [
        ("{{ range 1000000000000 }}{{ end }}", "takes more than 50000 steps"),
        ("{{ range 9999 }}{{ range 9999 }}{{ end }}{{ end }}", "takes more than 50000 steps"),
        ("{{ range 999 }}{{ $x := query `up` }}{{ end }}", "takes more than 50000 steps"),
        (
            "{{ $t := printf `%60000d` 1 }}{{ range 999 }}{{ $y := toUpper $t }}{{ end }}",
            "takes more than 50000 steps",
        ),
        ("{{ range 9999 }}0123456789{{ end }}", "the text is longer than 65536 characters"),
        ("{{ printf `%999999d` 1 }}", "the text is longer than 65536 characters"),
        (
            "{{ $x := `ab` }}{{ range 99 }}{{ $x = print $x $x }}{{ end }}",
            "the text is longer than 65536 characters",
        ),
        (
            "{{ reReplaceAll `` (printf `%9999d` 1) (printf `%9999d` 1) }}",
            "the text is longer than 65536 characters",
        ),
        (
            "{{ define `t` }}{{ template `t` . }}{{ end }}{{ template `t` }}",
            "exceeded maximum template depth (60)",
        ),
        (
            "{{ $x := args }}{{ range 999 }}{{ $x = args $x $x }}{{ end }}{{ $x }}",
            "more than 50 args in one another",
        ),
        (
            "{{ $t := toTime 9e9 }}{{ range 999 }}{{ $t = $t.Add 9000000000000000000 }}{{ end }}",
            "outside of the years 1 to 9999",
        ),
    ],
)
def test_what_would_not_end_or_fit_ends_as_an_error_text(template, what):
    assert expand(template).rstrip(">").endswith(what)


@pytest.mark.parametrize("text", ["\\xff", "\\xe6\\x98", "\\xed\\xa0\\x80"])
def test_bytes_that_are_no_text_never_leave(text):
    calls = [
        "",
        "title",
        "toUpper",
        "js",
        "html",
        "urlquery",
        "stripDomain",
        'printf "%q %x %s" 1 2',
        'reReplaceAll "." "$0"',
    ]
    shown = "".join(expand(f'{{{{ "{text}" | print | {call or "print"} }}}}') for call in calls)
    assert shown.encode()


WORDS = (
    'printf "%d%5s" query "up" first .Labels .gpu $labels index len humanize .Add toDuration reReplaceAll'
    " toTime slice eq $x $x:= nil -1 1.5 ( ) | . , range with if else end break match label é /* */ $value"
)
ACTIONS = st.lists(st.sampled_from(WORDS.split()), max_size=6).map(
    lambda words: f"{{{{ {' '.join(words)} }}}}"
)
COMMON = [
    "{{ if $value }}",
    "{{ end }}",
    "{{ range query `up` }}",
    "{{ with $x := 3 }}",
    "{{ . }}",
    "{{ else }}",
    "a",
]


@settings(max_examples=300, deadline=None)
@given(st.lists(ACTIONS | st.sampled_from(COMMON), max_size=8).map("".join))
def test_whatever_is_written_is_refused_at_a_place_in_it_or_expanded(text):
    try:
        template = Template(text)
    except TemplateError as error:
        place = error.position
    else:
        place = 0
        assert template.expand(LABELS, 1.0, CONTEXT).encode() is not None
    assert 0 <= place <= len(text)
