"""Phrases that `gpuwatch config`, `history`, `why` and `capture` print; never decides which is said."""

# ruff: noqa: RUF001 -- fullwidth punctuation is what Chinese is written with

from __future__ import annotations

from typing import Final

from gpuwatch.notify.phrase import Phrase

# Heads of the columns of `gpuwatch config log`, and what a revision is.
_LOG: Final = {
    "head.rev": Phrase("REV", "版本"),
    "head.made": Phrase("MADE", "创建时间"),
    "head.by": Phrase("BY", "操作者"),
    "head.is": Phrase("IS", "状态"),
    "head.kv_tokens": Phrase("KV TOKENS", "KV 令牌"),
    "head.start": Phrase("START", "启动耗时"),
    "head.gpu_memory": Phrase("GPU MEMORY", "显存"),
    "head.tokens_per_s": Phrase("TOKENS/S", "令牌/秒"),
    "head.first_token": Phrase("TTFT P95", "首令牌 P95"),
    "head.served": Phrase("SERVED", "服务时长"),
    "head.failed": Phrase("FAILED", "失败"),
    "head.why": Phrase("WHY", "原因"),
    "is.in use": Phrase("in use", "使用中"),
    "is.wanted": Phrase("wanted", "期望"),
    "is.last good": Phrase("last good", "最近可用"),
    "is.next start": Phrase("next start", "下次启动"),
    "config.failed_of": Phrase("{failures} of {starts}", "{failures}/{starts}"),
    "config.note": Phrase(
        "GPU memory (peak), tokens/s (best minute) and time to first token: of the last hour that it served",
        "显存（峰值）、令牌/秒（最佳一分钟）与首令牌时间：取自其最近一小时的服务",
    ),
    "config.none_yet": Phrase("there is no revision yet", "尚无任何版本"),
    "config.unmeasured": Phrase("without what was measured: {detail}", "缺少测量数据：{detail}"),
}

_CONFIG: Final = {
    "config.shown": Phrase(
        "revision {revision} of {server}, {made}, by {by}: {why}",
        "{server} 第 {revision} 版，{made}，操作者 {by}：{why}",
    ),
    "config.chosen": Phrase("revision {revision}, {made}, by {by}", "第 {revision} 版，{made}，操作者 {by}"),
    "config.same": Phrase(
        "revisions {before} and {after} say the same", "第 {before} 版与第 {after} 版内容相同"
    ),
    "config.nothing_changes": Phrase("nothing changes", "没有变化"),
    "config.nothing_wanted": Phrase(
        "nothing changes of what is wanted; in use is revision {present}:"
        " `gpuwatch config rollback {server} {wanted}` goes back",
        "期望的配置没有变化；使用中的是第 {present} 版：`gpuwatch config rollback {server} {wanted}` 可改回",
    ),
    "config.stays": Phrase(
        "what is in use stays, and is what is wanted", "使用中的配置不变，并成为期望的配置"
    ),
    "config.ask": Phrase("wish for this?", "提交此修改？"),
    "config.back_to": Phrase("back to {revision}", "回到第 {revision} 版"),
    "config.waits": Phrase(
        "a change by {by} of {made} waits to be taken up", "{by} 于 {made} 提交的修改尚待执行"
    ),
    "config.not_running": Phrase(
        "gpuwatch does not run: the wish waits until it does, and {server} stays as it is",
        "gpuwatch 未运行：修改将等到它运行时执行，{server} 保持现状",
    ),
    "config.paused": Phrase(
        "remediation is paused: the wish waits until it ends, and {server} stays as it is",
        "处置已暂停：修改将等到暂停结束后执行，{server} 保持现状",
    ),
    "config.taken_up": Phrase(
        "the daemon takes it up within a second: vLLM's own interpreter checks it, then {server} is drained,"
        " started anew and watched, and set back if it does not serve; see `gpuwatch status`",
        "守护进程将在一秒内执行：先由 vLLM 自己的解释器检查，再排空并重新启动 {server}、验证结果，"
        "若不能服务则改回；见 `gpuwatch status`",
    ),
}

_WHY: Final = {
    "history.nothing": Phrase("nothing has been done yet", "尚未做过任何处置"),
    "history.no_refusal": Phrase("nothing is refused at present", "当前没有未执行的处置"),
    "option.same_arguments": Phrase("the same arguments", "参数不变"),
    "option.last_good": Phrase("the last good revision", "最近可用的版本"),
    "option.wait": Phrase("to wait", "等待"),
    "option.return": Phrase("back to what is wanted", "恢复期望的配置"),
    "arg.from": Phrase("from {from}", "由 {from}"),
    "arg.to": Phrase("to {to}", "改为 {to}"),
    "arg.revision": Phrase("revision {revision}", "第 {revision} 版"),
    "arg.keep_revision": Phrase("unless revision {keep_revision} serves", "除非第 {keep_revision} 版在服务"),
    "arg.for_ms": Phrase("for {for_ms}", "持续 {for_ms}"),
    "arg.limit": Phrase("to {limit}", "上限 {limit}"),
    "arg.limit_admission": Phrase("admission {limit_admission}", "放行 {limit_admission}"),
    "arg.limit_running": Phrase("running {limit_running}", "并发 {limit_running}"),
    "arg.command": Phrase("{command}", "{command}"),
    "arg.free_percent": Phrase("{free_percent} % free", "空闲 {free_percent}%"),
    "arg.wanted_percent": Phrase("{wanted_percent} % wanted", "需要 {wanted_percent}%"),
    "arg.age": Phrase("after {age}", "已过 {age}"),
}

CONSOLE: Final = {
    **_LOG,
    **_CONFIG,
    **_WHY,
    "capture.missing": Phrase("missing: {detail}", "缺少：{detail}"),
}
