"""Templates: Go's language, and what is said of mistakes in it, when it is read and when it is expanded."""

import pytest

from gpuwatch.errors import QueryError
from gpuwatch.records import Labels
from gpuwatch.rules.templates import Context, Template, TemplateError

LABELS = Labels.of("gpu_heat", gpu="0", host="node-1.example.com:9100", model="Qwen3", zh="显存")
FOUND = [(Labels.of("up", gpu=gpu), value) for gpu, value in (("b", 1.0), ("a", 0.0))]
ERROR = "<error expanding template: error executing template __alert_Hot: template: __alert_Hot:"


def query(expression):
    if expression == "bad(":
        raise QueryError("unclosed parenthesis")
    return FOUND if expression == "up" else []


CONTEXT = Context(query=query, external_labels={"site": "b2"}, external_url="https://watch.example/gpu")


def expand(template, value=1.0):
    return Template(template, "Hot").expand(LABELS, value, CONTEXT)


def failure(template, value=1.0):
    """What went wrong, without the beginning that all such texts share."""
    text = expand(template, value)
    assert text.startswith(ERROR)
    assert text.endswith(">")
    return text[len(ERROR) : -1].replace(' executing "__alert_Hot" at', "")


def refusal(template):
    with pytest.raises(TemplateError) as caught:
        Template(template)
    return caught.value


# ---- the language


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("no action", "no action"),
        ("{{ $labels.gpu }}{{ .Labels.gpu }}{{ $.Labels.gpu }}", "000"),
        ("{{ $labels.none }}|{{ .Labels.none }}|", "||"),
        ("{{ $value }} {{ .Value }}", "1 1"),
        ("{{ $externalLabels.site }} {{ .ExternalURL }}", "b2 https://watch.example/gpu"),
        ("a {{- /* gone */ -}} b {{ `c` -}}\n d {{- 1 }}", "ab cd1"),
        ("{{-3}} {{- -3 -}} x", "-3-3x"),
        ('{{ "a\\t\\x41\\u00e9\\"" }}{{ `a\\t` }}{{ \'a\' }}', 'a\tAé"a\\t97'),
        (
            "{{ 0x1F }} {{ 0o17 }} {{ 017 }} {{ 0b11 }} {{ 1_000 }} {{ .5 }} {{ 0x1p4 }}",
            "31 15 15 3 1000 0.5 16",
        ),
        ("{{ true }} {{ 1e3 }} {{ 1000000.0 }} {{ 1000000 }}", "true 1000 1e+06 1000000"),
        ("{{ ($labels).gpu }} {{ (index $labels `gpu`) }} {{ ((1)) }}", "0 0 1"),
        ('{{ "b" | printf "%s-%s" "a" | len }}', "3"),
        ("{{ if 0 }}a{{ else if $labels.none }}b{{ else if 0.0 }}c{{ else }}d{{ end }}", "d"),
        ("{{ if $x := 5 }}{{ $x }}{{ end }}{{ if $y := 0 }}{{ else if eq $y 0 }}{{ $y }}{{ end }}", "50"),
        ('{{ with $labels.gpu }}<{{ . }}>{{ end }}{{ with "" }}{{ else with "b" }}{{ . }}{{ end }}', "<0>b"),
        ("{{ with 0 }}{{ else }}{{ .Labels.gpu }}{{ end }}", "0"),
        ("{{ range 3 }}{{ . }}{{ end }} {{ range $i := 2 }}{{ $i }}{{ end }}", "012 01"),
        ('{{ range $k, $v := args "x" 2 }}{{ $k }}={{ $v }};{{ end }}', "arg0=x;arg1=2;"),
        ('{{ range query "up" }}{{ .Labels.gpu }}{{ .Value }} {{ end }}', "b1 a0 "),
        ('{{ range $i, $s := query "up" }}{{ if $i }}, {{ end }}{{ $s.Labels.gpu }}{{ end }}', "b, a"),
        ('{{ range query "none" }}x{{ else }}none{{ end }}', "none"),
        (
            "{{ range 9 }}{{ if eq . 1 }}{{ continue }}{{ end }}{{ . }}{{ if . }}{{break}}{{ end }}{{ end }}",
            "02",
        ),
        ('{{ $x := "a" }}{{ if true }}{{ $x = "b" }}{{ $x := "c" }}{{ $x }}{{ end }}{{ $x }}', "cb"),
        ("{{ $i := 9 }}{{ range $i = 3 }}{{ end }}{{ $i }}", "2"),
        (
            '{{ define "t" }}[{{ . }}]{{ end }}{{ template "t" $labels.gpu }}{{ template "t" }}',
            "[0][<no value>]",
        ),
        ('{{ block "b" 5 }}<{{ . }}>{{ end }}{{ template "b" 6 }}', "<5><6>"),
        ('{{ define "t" }}{{ $.Labels.gpu }}{{ end }}{{ template "t" . }}', "0"),
    ],
)
def test_the_language_is_gos(template, text):
    assert expand(template) == text


@pytest.mark.parametrize(
    ("template", "what", "position"),
    [
        ("GPU {{ $labels.gpu", "unclosed action", 4),
        ("{{ (1 }}", "unclosed left paren", 0),
        ("{{ 1) }}", "unexpected right paren", 4),
        ('a{{ "x }}', "unterminated quoted string", 4),
        ("{{ `x }}", "unterminated raw quoted string", 3),
        ("{{ 'x }}", "unterminated character constant", 3),
        ("{{/* x }}", "unclosed comment", 0),
        ("{{/* x */ }}", "comment ends before closing delimiter", 0),
        ("{{ $labels.gpu } }}", 'unexpected "}" in operand', 15),
        ("{{ nosuch }}", 'function "nosuch" not defined', 3),
        ('{{ tmpl "a" . }}', 'function "tmpl" not defined', 3),  # Prometheus has it in its pages alone
        ("{{ $other.x }}", 'undefined variable "$other"', 3),
        ('{{ define "t" }}{{ $labels.gpu }}{{ end }}', 'undefined variable "$labels"', 19),
        ("{{ if 1 }}{{ $x := 1 }}{{ end }}{{ $x }}", 'undefined variable "$x"', 35),
        ("{{ }}", "missing value for command", 3),
        ("{{ if }}{{ end }}", "missing value for if", 6),
        ("{{ $value | 1 }}", "non executable command in pipeline stage 2", 12),
        ("{{ 1.5.x }}", 'unexpected . after term "1.5"', 6),
        ('{{ "a".x }}', 'unexpected . after term "\\"a\\""', 6),
        ("{{ 08 }}", 'integer overflow: "08"', 3),
        ("{{ 1a }}", 'bad number syntax: "1a"', 3),
        ("{{ 3i }}", 'illegal number syntax: "3i"', 3),
        ("{{ a$b }}", "bad character U+0024 '$'", 3),
        ("{{ “a” }}", "unrecognized character in action: U+201C '“'", 3),
        ('{{ "\\q" }}', "invalid syntax", 3),
        ("{{ end }}", "unexpected {{end}}", 0),
        ("{{ if 1 }}", "unexpected EOF", 10),
        ("{{ if 1 }}{{ else }}{{ else }}{{ end }}", "expected end; found {{else}}", 20),
        ("{{ range 1 }}{{ else if 1 }}{{ end }}", "unexpected <if> in input", 21),
        ("{{ break }}", "{{break}} outside {{range}}", 0),
        ("{{ range 1 }}{{ else }}{{ continue }}{{ end }}", "{{continue}} outside {{range}}", 23),
        ("{{ $a, $b := 1 }}", "too many declarations in command", 7),
        ("{{ range $a, 1 }}{{ end }}", "range can only initialize variables", 13),
        ("{{ template nosuch }}", 'unexpected "nosuch" in template clause', 12),
        ('{{ if 1 }}{{ define "t" }}{{ end }}{{ end }}', "unexpected <define> in command", 13),
        (
            '{{ define "t" }}a{{ end }}{{ define "t" }}b{{ end }}',
            'template: multiple definition of template "t"',
            26,
        ),
    ],
)
def test_what_prometheus_refuses_is_refused_in_its_words_with_the_place(template, what, position):
    error = refusal(template)
    assert (error.what, error.position) == (what, position)


# ---- types and errors


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (
            "{{ gt $value 1 }}",
            "1:115: <gt $value 1>: error calling gt: incompatible types for comparison: float64 and int",
        ),
        (
            "{{ humanize `x` }}",
            '1:115: <humanize `x`>: error calling humanize: strconv.ParseFloat: parsing "x": invalid syntax',
        ),
        (
            "{{ humanize $labels }}",
            "1:115: <humanize $labels>: error calling humanize: can't convert map[string]string to float",
        ),
        (
            '{{ query "none" | first }}',
            "1:130: <first>: error calling first: first() called on vector with no elements",
        ),
        ('{{ query "bad(" }}', '1:115: <query "bad(">: error calling query: unclosed parenthesis'),
        ("{{ len 1 }}", "1:115: <len 1>: error calling len: len of type int"),
        ('{{ index "abc" 4 }}', '1:115: <index "abc" 4>: error calling index: index out of range: 4'),
        ("{{ toUpper $value }}", "1:123: <$value>: wrong type for value; expected string; got float64"),
        ("{{ toUpper 1 }}", "1:123: <1>: expected string; found 1"),
        ("{{ toUpper nil }}", "1:123: <nil>: cannot assign nil to string"),
        ("{{ toUpper }}", "1:115: <toUpper>: wrong number of args for toUpper: want 1 got 0"),
        ("{{ and }}", "1:115: <and>: wrong number of args for and: want at least 1 got 0"),
        ("{{ $labels.gpu.x }}", "1:122: <$labels.gpu.x>: can't evaluate field x in type string"),
        ("{{ .Value.x }}", "1:121: <.Value.x>: can't evaluate field x in type interface {}"),
        ('{{ (query "up").x }}', '1:122: <"up">: can\'t evaluate field x in type template.queryResult'),
        ("{{ $labels.gpu 1 }}", "1:122: <$labels.gpu>: gpu is not a method but has arguments"),
        ('{{ "x" 1 }}', '1:115: <"x">: can\'t give argument to non-function "x"'),
        ("{{ nil }}", "1:115: <nil>: nil is not a command"),
        ("{{ range $value }}{{ end }}", "1:121: <$value>: range can't iterate over 1"),
        ('{{ template "none" }}', '1:124: <{{template "none"}}>: template "none" not defined'),
        ("{{ $x = 1 }}", "1:120: <1>: undefined variable: $x"),
        ("{{ 9223372036854775808 }}", "1:115: <9223372036854775808>: 9223372036854775808 overflows int"),
        ("显存\n 显存 {{ len 1 }}", "2:11: <len 1>: error calling len: len of type int"),
        (
            '{{ match "(" "x" }}',
            '1:115: <match "(" "x">: error calling match: error parsing regexp: missing closing ): `(`',
        ),
    ],
)
def test_a_failure_is_told_in_the_text_as_go_tells_it(template, what):
    assert failure(template) == what


def test_a_failure_in_a_defined_template_names_both():
    text = expand('{{ define "t" }}{{ .x }}{{ end }}{{ template "t" 1 }}')
    assert text == f'{ERROR}1:131: executing "t" at <.x>: can\'t evaluate field x in type int>'


# ---- what the linter asks


@pytest.mark.parametrize(
    ("template", "labels", "uses_value"),
    [
        ("plain", set(), False),
        (
            "{{ $labels.a }}{{ .Labels.b }}{{ $.Labels.c }}{{ index $labels `d` }}{{ (.Labels).e }}",
            set("abcde"),
            False,
        ),
        ("{{ $labels }}{{ $externalLabels.site }}{{ query `up` | first | label `x` }}", set(), False),
        ("{{ if gt $value 1.0 }}{{ $labels.a }}{{ else }}{{ .Labels.b }}{{ end }}", {"a", "b"}, True),
        ("{{ range query `up` }}{{ .Labels.a }}{{ .Value }}{{ $.Labels.b }}{{ end }}", {"b"}, False),
        ("{{ with $labels.a }}{{ . }}{{ else }}{{ .Value }}{{ end }}", {"a"}, True),
        ("{{ define `t` }}{{ .Labels.a }}{{ end }}{{ template `t` . }}", {"a"}, True),
        ("{{ . }}", set(), True),
    ],
)
def test_a_template_tells_which_labels_it_names_and_whether_it_reads_the_value(template, labels, uses_value):
    parsed = Template(template)
    assert (parsed.labels_used, parsed.uses_value) == (labels, uses_value)


def test_only_a_text_without_actions_is_constant():
    assert Template("a } {b}").is_constant
    assert not Template("a{{/* b */}}").is_constant
