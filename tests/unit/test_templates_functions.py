"""Templates: what Go's own functions and those of Prometheus print."""

import pytest

from gpuwatch.records import Labels
from gpuwatch.rules.templates import Context, Template, functions, humanize, operators, texts, times

LABELS = Labels.of("gpu_heat", gpu="0", host="node-1.example.com:9100", model="Qwen3", zh="显存")
FOUND = [(Labels.of("up", gpu=gpu), value) for gpu, value in (("b", 1.0), ("a", 0.0))]


CONTEXT = Context(
    query=lambda expression: FOUND if expression == "up" else [],
    now_ms=1_435_065_584_128,
    external_labels={"site": "b2"},
    external_url="https://watch.example/gpu",
)


def expand(template, value=1.0):
    return Template(template, "Hot").expand(LABELS, value, CONTEXT)


# ---- Go's


@pytest.mark.parametrize(
    ("template", "text"),
    [
        (
            "{{ eq 1 2 1 }} {{ ne `a` `b` }} {{ lt 1 2 }} {{ ge 1.5 1.5 }} {{ eq (index `a` 0) 97 }}",
            "true true true true true",
        ),
        ("{{ and 1 0 }} {{ or 0 `x` }} {{ not 0 }} {{ or true (len 1) }}", "0 x true true"),
        ("{{ len `显存` }} {{ len $labels }} {{ slice `显存` 0 3 }} {{ slice `显存` 0 1 }}", "6 5 显 \ufffd"),
        ("{{ index `abc` 1 }} {{ index $labels `gpu` }} {{ (index (query `up`) 1).Value }}", "98 0 0"),
        ("{{ print 1 2 `a` 3 4 }} {{ println 1 `a` }}|", "1 2a3 4 1 a\n|"),
        ("{{ html `<a>'` }} {{ js `<'` }} {{ urlquery `a b&` }}", "&lt;a&gt;&#39; \\u003C\\' a+b%26"),
        ("{{ args 1 `b` }} {{ (args 1 2).arg1 }} {{ (args 1).arg9 }}", "map[arg0:1 arg1:b] 2 <no value>"),
        ("{{ $externalLabels }}{{ query `up` | first }}", "map[site:b2]{map[__name__:up gpu:b] 1}"),
    ],
)
def test_gos_own_functions(template, text):
    assert expand(template) == text


@pytest.mark.parametrize(
    ("form", "args", "text"),
    [
        ("%d %5d|%-5d|%05d %x %X %o %b", "1 2 3 4 255 255 8 5", "1     2|3    |00004 ff FF 10 101"),
        (
            "%+d % d %#x %#o %O %.3d %c %q %U",
            "1 2 255 8 8 5 97 97 97",
            "+1  2 0xff 010 0o10 005 a 'a' U+0061",
        ),
        (
            "%f %.1f %8.2f|%-8.1f|%+.1f %06.1f",
            "1.5 2.25 3.0 4.0 5.0 -1.5",
            "1.500000 2.2     3.00|4.0     |+5.0 -001.5",
        ),
        (
            "%e %g %G %.3g %v",
            "1.5 1e-7 1e-7 1234.5 1234567.0",
            "1.500000e+00 1e-07 1E-07 1.23e+03 1.234567e+06",
        ),
        ("%s|%5s|%-5s|%.1s|%q|%x|% X", "`a` `a` `a` `显存` `a` `ab` `ab`", 'a|    a|a    |显|"a"|6162|61 62'),
        ("%t %v %T %T", "true false 1.5 $labels", "true false float64 map[string]string"),
        ("%[2]d %[1]d %*d %.*f", "1 2 4 3 2.25", "2 1  4 2.250"),  # [1] goes on with the second
        ("%d %s %t", "$value $value 1", "%!d(float64=1) %!s(float64=1) %!t(int=1)"),
        ("%d %d", "1", "1 %!d(MISSING)"),
        ("%d", "1 `x` 2.5", "1%!(EXTRA string=x, float64=2.5)"),
        ("%[3]d %z %", "1", "%!d(BADINDEX) %!z(int=1) %!(NOVERB)"),
        ("%v %d", "nil nil", "<nil> %!d(<nil>)"),
        (
            "%+v %v",
            "(query `up` | first) $externalLabels",
            "&{Labels:map[__name__:up gpu:b] Value:1} map[site:b2]",
        ),
        (
            "%s",
            "(slice (query `up`) 1)",
            "[%!s(*template.sample=&{map[__name__:up gpu:a] 0})]",
        ),
    ],
)
def test_printf_prints_as_gos_does(form, args, text):
    assert expand(f"{{{{ printf `{form}` {args} }}}}") == text


# ---- Prometheus' functions


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0 0 0s 0% 0"),
        (1234567.0, "1.235M 1.177Mi 14d 6h 56m 7s 1.235e+08% 1.234567e+06"),
        (0.00125, "1.25m 0.00125 1.25ms 0.125% 0.00125"),
        (-93784.0, "-93.78k -91.59ki -1d 2h 3m 4s -9.378e+06% -93784"),
        (59.999, "60 60 60s 6000% 59.999"),
        (1e30, "1e+06Y 8.272e+05Yi -106751991167300d -15h -30m -8s 1e+32% 1e+30"),
        (float("nan"), "NaN NaN NaN NaN% NaN"),
        (float("-inf"), "-Inf -Inf -Inf -Inf% -Inf"),
    ],
)
def test_numbers_are_made_readable(value, text):
    template = (
        "{{ humanize $value }} {{ humanize1024 $value }} {{ humanizeDuration $value }}"
        " {{ humanizePercentage $value }} {{ $value }}"
    )
    assert expand(template, value) == text


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ('{{ query "up" | first | value }} {{ query "up" | first | label "gpu" }}', "1 b"),
        (
            '{{ query "up" | sortByLabel "gpu" | first | label "gpu" }}|{{ query "up" | first | strvalue }}',
            "a|",
        ),
        ('{{ humanize "1e3" }} {{ humanize 1234 }} {{ humanize "+Inf" }}', "1k 1.234k +Inf"),
        (
            '{{ title "hello big world" }} {{ toUpper "aßé" }} {{ toLower "AÉ" }}',
            "Hello Big World Aßé aé".replace("ßé", "ßÉ"),
        ),
        ('{{ match "^n.*:\\\\d+$" $labels.host }} {{ match "x" "y" }}', "true false"),
        ('{{ reReplaceAll "(.*):(?P<p>.*)" "$p-${1}$$" $labels.host }}', "9100-node-1.example.com$"),
        ('{{ reReplaceAll "x*" "-" "显a" }}', "-显-a-"),
        ('{{ reReplaceAll "(a)" "${01}$1" "a" }}', "a"),
        ('{{ stripPort "a:1" }} {{ stripPort "[::1]:2" }} {{ stripPort "a" }}', "a ::1 a"),
        (
            '{{ stripDomain "a.b:1" }} {{ stripDomain "10.0.0.7:1" }} {{ stripDomain "a.b" }}',
            "a:1 10.0.0.7:1 a",
        ),
        (
            '{{ graphLink "up == 1" }} {{ tableLink "a" }}',
            "/graph?g0.expr=up+%3D%3D+1&g0.tab=0 /graph?g0.expr=a&g0.tab=1",
        ),
        ("{{ externalURL }} {{ pathPrefix }}", "https://watch.example/gpu /gpu"),
        ('{{ safeHtml "<b>" }}', "<b>"),
        ('{{ parseDuration "1h30m" }} {{ parseDuration "-5m" | humanizeDuration }}', "5400 -5m 0s"),
        ("{{ humanizeTimestamp 1435065584.128 }}", "2015-06-23 13:19:44.128 +0000 UTC"),
        (
            '{{ (toTime 1435065584.128).Format "Mon _2 Jan 2006 15:04:05.00 PM MST" }}',
            "Tue 23 Jun 2015 13:19:44.12 PM UTC",
        ),
        (
            "{{ ((toTime 90).Sub (toTime 0)).Minutes }} {{ (toTime 5400.5).Sub (toTime 0) }}",
            "1.5 1h30m0.5s",
        ),
        ("{{ (toTime 60).Unix }} {{ (toTime 0).Weekday }}", "60 Thursday"),
    ],
)
def test_prometheus_functions(template, text):
    assert expand(template) == text


@pytest.mark.parametrize(
    ("template", "what"),
    [
        (
            "{{ toTime 1e10 }}",
            "1e+10 cannot be represented as a nanoseconds timestamp since it overflows int64",
        ),
        ('{{ parseDuration "5x" }}', 'not a valid duration string: "5x"'),
        (
            '{{ reReplaceAll "a**" "" "" }}',
            "regexp: Compile(`a**`): error parsing regexp: invalid nested repetition operator: `**`",
        ),
        ('{{ label "x" nil }}', "runtime error: invalid memory address or nil pointer dereference"),
    ],
)
def test_a_function_that_fails_says_why(template, what):
    assert expand(template).endswith(f": {what}>")


def test_the_names_that_are_checked_are_the_functions_that_there_are():
    rooms = (operators, humanize, texts, times)
    assert {name for room in rooms for name in room.FUNCTIONS} == functions.NAMES
    assert all(functions.function(name) for name in functions.NAMES)
