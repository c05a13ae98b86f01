"""Phrases about what is done to servers: steps, outcomes, refusals, options; never decides which is said."""

# ruff: noqa: RUF001 -- fullwidth punctuation is what Chinese is written with

from __future__ import annotations

from typing import Final

from gpuwatch.notify.phrase import Phrase

REFUSALS: Final = {
    "backlog_skipped": Phrase(
        "it began before {until}, and a person said to leave alone what was there by then",
        "它在 {until} 之前已存在，已由人指定跳过",
    ),
    "breaker_open": Phrase(
        "{done} remediations did not help ({limit} within {per} are the most); a person must look"
        " (`gpuwatch resume` allows the next)",
        "{done} 次处置无效（{per}内上限 {limit} 次），须先人工查看（`gpuwatch resume` 后可再次处置）",
    ),
    "two_failures": Phrase(
        "{done} remediations of this server did not help; it stays as it is until a person looks"
        " (`gpuwatch resume` allows the next)",
        "该服务已有 {done} 次处置无效，保持现状，须人工查看（`gpuwatch resume` 后可再次处置）",
    ),
    "server_not_serving": Phrase(
        "the server does not serve, and this is asked of one that does",
        "服务未在运行，此操作只能对运行中的服务执行",
    ),
    "no_guest": Phrase(
        "no guest of gpuwatch answers in vLLM's processes (see `gpuwatch guest`)",
        "vLLM 进程中没有应答的 gpuwatch guest（见 `gpuwatch guest`）",
    ),
    "load_unknown": Phrase(
        "how many requests run is not known, and the policy names no limit",
        "不知道正在运行的请求数，策略也未给出上限",
    ),
    "others_growing": Phrase(
        "another process on that GPU takes more and more memory, and would take what is given back",
        "该 GPU 上有其他进程的显存在增长，释放的显存会被它占走",
    ),
    "others_unknown": Phrase(
        "whether another process on that GPU is growing is not known",
        "不知道该 GPU 上是否有其他进程的显存在增长",
    ),
    "no_revisions": Phrase(
        "gpuwatch does not keep this server's settings, or cannot tell which are in force"
        " (`servers[].revisions`)",
        "gpuwatch 未管理该服务的配置，或不知道当前生效的版本（`servers[].revisions`）",
    ),
    "would_fail_again": Phrase(
        "with the same arguments it would fail again: {failure}", "用同样的参数仍会失败：{failure}"
    ),
    "memory_not_free": Phrase(
        "only {free_percent} % of a GPU is there and {wanted_percent} % is wanted; waiting for {age}",
        "GPU 只有 {free_percent}% 可用，需要 {wanted_percent}%；已等待 {age}",
    ),
    "memory_unknown": Phrase("how much GPU memory is free is not known", "不知道有多少空闲显存"),
    "nothing_to_change": Phrase(
        "no change is known that would cure it and is within bounds ({failure})",
        "没有在允许范围内的参数修改可以解决（{failure}）",
    ),
    "already_current": Phrase("revision {revision} is in use already", "第 {revision} 版已在使用"),
    "failed_already": Phrase("these arguments failed before", "这组参数曾经失败"),
    "no_such_revision": Phrase("there is no revision {revision}", "没有第 {revision} 版"),
}

OUTCOMES: Final = {
    "no_guest": REFUSALS["no_guest"],
    "stopped_by_operator": Phrase("an operator stopped the server", "服务由运维人员主动停止"),
    "started_meanwhile": Phrase(
        "somebody else started the server meanwhile; it is left to come up",
        "期间已有人启动该服务，gpuwatch 不再干预",
    ),
    "server_gone": Phrase("the server ended, and the limits with it", "服务已退出，限制随之失效"),
    "step_failed": Phrase("a step failed: {detail}", "步骤失败：{detail}"),
    "unknown_step": Phrase("another version of gpuwatch planned it", "由另一版本的 gpuwatch 计划"),
    "revision_refused": Phrase("vLLM refuses the settings: {detail}", "vLLM 不接受该配置：{detail}"),
    "new_alert": Phrase("it brought another alert: {alerts}", "引发了新的告警：{alerts}"),
    "fewer_kv_tokens": Phrase(
        "the KV cache holds {tokens} tokens, {least} were promised",
        "KV 缓存只能容纳 {tokens} 个 token，低于 {least}",
    ),
    "less_throughput": Phrase(
        "{rate} tokens/s while requests wait, less than {least}", "请求排队时仅 {rate} token/s，低于 {least}"
    ),
    "lifted": Phrase("the limits were lifted after {seconds}", "{seconds}后解除限制"),
    "untouched": Phrase("done without touching the server", "已完成，未改动服务"),
}

STEPS: Final = {
    "step.restart": Phrase("restart", "重启"),
    "step.reconfigure": Phrase("reconfigure", "改配置并重启"),
    "step.capture": Phrase("capture evidence", "采集证据"),
    "step.check": Phrase("check the settings", "检查配置"),
    "step.drain": Phrase("drain", "排空请求"),
    "step.stop": Phrase("stop", "停止"),
    "step.await_memory": Phrase("wait for the memory", "等待显存释放"),
    "step.swap": Phrase("change the settings", "切换配置"),
    "step.start": Phrase("start", "启动"),
    "step.canary": Phrase("ask for one token", "探测一个令牌"),
    "step.open_door": Phrase("open the door", "恢复放行"),
    "step.limit_admission": Phrase("limit admission", "限制放行"),
    "step.limit_running": Phrase("limit what runs", "限制并发"),
    "step.hold": Phrase("hold the limits", "保持限制"),
    "step.lift": Phrase("lift the limits", "解除限制"),
    "step.release_cache": Phrase("release cached memory", "释放缓存显存"),
    "step.reset_prefix_cache": Phrase("reset the prefix cache", "清空前缀缓存"),
    "step.sleep": Phrase("sleep", "休眠"),
    "step.wake": Phrase("wake", "唤醒"),
    "step.sleep_wake": Phrase("sleep and wake", "休眠并唤醒"),
    "step.run": Phrase("run the operator's command", "运行自定义命令"),
    "cost.capture": Phrase("some seconds", "数秒"),
    "cost.release_cache": Phrase("a slower step or two", "一两步变慢"),
    "cost.reset_prefix_cache": Phrase("prompts are computed anew", "提示词需重新计算"),
    "cost.limit_admission": Phrase("requests are refused", "部分请求被拒绝"),
    "cost.limit_running": Phrase("requests wait longer", "请求等待变长"),
    "cost.drain": Phrase("requests are refused, late ones are aborted", "拒绝新请求，超时的请求被中断"),
    "cost.sleep_wake": Phrase("the KV cache, and requests in hand", "KV 缓存与进行中的请求"),
    "cost.run": Phrase("nobody can tell", "无法得知"),
    "cost.restart": Phrase("no service for the time of a start", "启动期间中断服务"),
    "cost.reconfigure": Phrase("no service for the time of a start, or of two", "一到两次启动期间中断服务"),
    "step_state.done": Phrase("done", "已完成"),
    "step_state.late": Phrase("not done in time", "超时"),
    "step_state.failed": Phrase("failed", "失败"),
    "step_state.called_off": Phrase("called off", "被中止"),
    "step_state.under_way": Phrase("under way", "进行中"),
    "step_state.open": Phrase("not reached", "未到达"),
    "step_state.unknown": Phrase("nobody knows", "未知"),
}

# Why an option was taken, or was not.
OPTIONS: Final = {
    "chosen": Phrase("chosen", "选中"),
    "waited": Phrase("waited long enough", "等待已足够"),
    "passed": Phrase("does not object", "不阻止"),
    "no_bounds": Phrase(
        "no bounds are set for it (`servers[].bounds`)", "未设定其范围（`servers[].bounds`）"
    ),
    "out_of_bounds": Phrase("out of its bounds", "超出允许范围"),
    "on_command_line": Phrase(
        "set on the command line, which beats the file", "已在命令行中设定，优先于文件"
    ),
    "not_known": Phrase("its present value, or what fits, is not known", "不知道其当前值或合适的值"),
    "no_change": Phrase("it would change nothing", "不会带来变化"),
    "share_not_free": Phrase("so much memory is not free", "没有这么多空闲显存"),
    "not_offered": Phrase("this version of vLLM does not have it", "此版本 vLLM 不支持"),
    "not_named": Phrase("none is named in the settings", "配置中未指定"),
    "none_yet": Phrase("there is none yet", "尚无"),
}

HISTORY: Final = {
    "history.because": Phrase("because", "起因"),
    "history.by": Phrase("by", "操作者"),
    "history.mode": Phrase("mode", "模式"),
    "history.step": Phrase("now", "当前步骤"),
    "history.took": Phrase("took", "耗时"),
    "history.longest": Phrase("longest step", "最长步骤"),
    "history.revision": Phrase("revision", "配置版本"),
    "history.left_alone": Phrase("left alone", "未处置的结果"),
    "history.without_service": Phrase("without service", "中断"),
    "history.requests_finished": Phrase("finished", "完成请求"),
    "history.requests_aborted": Phrase("aborted", "中断请求"),
    "history.requests_refused": Phrase("refused", "拒绝请求"),
    "history.memory": Phrase("memory", "显存"),
    "history.throughput": Phrase("throughput", "吞吐"),
    "history.not_done": Phrase("not done", "未执行"),
    "history.alert": Phrase("alert", "告警"),
    "history.seen": Phrase("seen", "所见"),
    "history.considered": Phrase("considered", "考虑过"),
    "history.passed": Phrase("passed", "已通过的检查"),
    "history.said": Phrase("said", "人工"),
    "history.steps": Phrase("steps", "步骤"),
    "history.undo": Phrase("undo", "回退"),
    "history.action": Phrase("step", "步骤"),
    "history.began": Phrase("began", "开始时间"),
    "history.end": Phrase("how it ended", "结果"),
    "history.verified_for": Phrase("verified for", "验证时长"),
    "history.bundle": Phrase("bundle", "证据包"),
    "history.within": Phrase("within", "限时"),
    "shadow.itself": Phrase("over by itself", "自行恢复"),
    "shadow.person": Phrase("somebody saw to it", "人工处理"),
    "shadow.still": Phrase("goes on", "仍未恢复"),
    "signal.value": Phrase("value", "数值"),
    "signal.summary": Phrase("summary", "摘要"),
    "signal.verdict": Phrase("verdict", "判定"),
    "signal.running": Phrase("running", "运行中"),
    "signal.waiting": Phrase("waiting", "等待中"),
    "signal.kv_use_ratio": Phrase("KV-cache-in-use", "KV缓存占用"),
    "signal.failure": Phrase("failure", "故障"),
    "signal.tokens_per_s": Phrase("tokens/s", "每秒令牌"),
    "signal.least_tokens_per_s": Phrase("least-tokens/s", "最低每秒令牌"),
    "signal.kv_cache_tokens_least": Phrase("KV-tokens-needed", "所需KV令牌"),
    "signal.wanted": Phrase("wanted-revision", "期望的版本"),
    "signal.why": Phrase("why", "原因"),
    "signal.free_bytes": Phrase("free", "空闲显存"),
    "signal.rival_bytes": Phrase("held-by-others", "其他进程占用"),
    "said.approve": Phrase("approved by", "批准："),
    "said.deny": Phrase("denied by", "拒绝："),
    "said.abort": Phrase("stopped by", "中止："),
}
