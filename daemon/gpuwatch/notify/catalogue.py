"""Every phrase that people read, English and Chinese side by side; never decides which is said.

Refusals and outcomes go by their bare code, all others as `group.name`. Figures are `str.format`
fields; `wording.words` makes them human.
"""

# ruff: noqa: RUF001 -- fullwidth punctuation is what Chinese is written with

from __future__ import annotations

from typing import Final

from gpuwatch.notify import console, remedies
from gpuwatch.notify.phrase import Phrase

REFUSALS: Final = {
    "observe_mode": Phrase(
        "mode is observe (set remediation.mode: auto to allow it)",
        "当前为观察模式（设 remediation.mode: auto 后才会执行）",
    ),
    "paused": Phrase(
        "gpuwatch is paused until {until} (`gpuwatch resume` ends the pause)",
        "gpuwatch 已暂停至 {until}（`gpuwatch resume` 可提前恢复）",
    ),
    "paused_open": Phrase(
        "gpuwatch is paused (`gpuwatch resume` ends the pause)",
        "gpuwatch 已暂停（`gpuwatch resume` 可恢复）",
    ),
    "no_policy": Phrase("no policy matches this alert", "没有策略匹配此告警"),
    "notify_only": Phrase("its policy is to tell people and touch nothing", "其策略是只通知、不改动"),
    "no_server": Phrase(
        "the alert names no server that gpuwatch knows (see `servers:` in the settings)",
        "告警未指明 gpuwatch 所知的服务（见配置中的 `servers:`）",
    ),
    "no_supervisor": Phrase(
        "the server has no supervisor (set one under `servers:` to allow restarts)",
        "该服务未配置管理者（在 `servers:` 下设置 supervisor 后才能重启）",
    ),
    "cooling_down": Phrase(
        "the server rests after its last remediation, {left} left", "上次处置后的冷却期未过，还剩 {left}"
    ),
    "budget_spent": Phrase(
        "the budget is spent: {done} of {limit} remediations in {per}; a person should look",
        "处置次数已用完：{per}内 {done}/{limit} 次，需要人工查看",
    ),
    "under_way": Phrase("remediation {id} of this server is under way", "该服务的处置 {id} 正在进行"),
    "starting": Phrase("the server has been starting since {since}", "服务自 {since} 起正在启动"),
    "auto_restart": Phrase("systemd restarts it by itself", "systemd 正在自动重启它"),
    "end_unread": Phrase("what its log says of its end is being read", "正在读取日志中记录的终止原因"),
    "supervisor_unknown": Phrase(
        "the state of its supervisor cannot be read: {detail}", "读不到其管理者的状态：{detail}"
    ),
    "stale_data": Phrase(
        "the newest reading is {age} old, too old to act on", "最新读数已是 {age}前，不足以据此处置"
    ),
    "just_started": Phrase(
        "gpuwatch itself has just started and waits another {left}", "gpuwatch 刚启动，再等 {left}"
    ),
    "clock_jumped": Phrase(
        "the clock of the host jumped; gpuwatch waits another {left}", "主机时钟发生跳变，再等 {left}"
    ),
    "stopped_by_operator": Phrase("an operator stopped the server", "服务由运维人员主动停止"),
    "internal_error": Phrase(
        "gpuwatch met a fault of its own (`journalctl -u gpuwatch` shows it)",
        "gpuwatch 自身出错（详见 `journalctl -u gpuwatch`）",
    ),
    **remedies.REFUSALS,
}

OUTCOMES: Final = {
    "restored": Phrase("healthy again after {seconds}", "{seconds}后恢复正常"),
    "step_late": Phrase("not done within {seconds}", "未在 {seconds}内完成"),
    "died_again": Phrase("the server died again: {detail}", "服务再次退出：{detail}"),
    "relapsed": Phrase("the alert came back while the result was watched", "验证期间告警再次出现"),
    "never_verified": Phrase("not proved healthy within {seconds}", "{seconds}内未能确认恢复"),
    "denied": Phrase("{by} said no", "{by} 已拒绝"),
    "aborted_by": Phrase("{by} stopped it", "{by} 已中止"),
    "approval_expired": Phrase("nobody approved within {minutes}", "{minutes}内无人审批"),
    "not_asked": Phrase("the step could not be asked for: {detail}", "无法发起该步骤：{detail}"),
    "dry_run": Phrase("dry run, nothing was touched", "演练，未做任何改动"),
    "alert_over": Phrase("the alert was over before anything was done", "尚未处置，告警已自行恢复"),
    **remedies.OUTCOMES,
}

_STATES: Final = {
    "severity.critical": Phrase("CRIT", "严重"),
    "severity.warning": Phrase("WARN", "警告"),
    "severity.info": Phrase("INFO", "提示"),
    "alert.pending": Phrase("pending", "待定"),
    "alert.firing": Phrase("firing", "告警中"),
    "alert.resolved": Phrase("resolved", "已恢复"),
    "server.unseen": Phrase("never seen", "未见过"),
    "server.starting": Phrase("starting", "启动中"),
    "server.serving": Phrase("serving", "服务中"),
    "server.down": Phrase("down", "已宕机"),
    "server.stopped": Phrase("stopped by an operator", "已由人工停止"),
    "remediation.planned": Phrase("planned", "已计划"),
    "remediation.awaiting_approval": Phrase("waiting for approval", "等待审批"),
    "remediation.applying": Phrase("applying", "执行中"),
    "remediation.verifying": Phrase("verifying", "验证中"),
    "remediation.rolling_back": Phrase("taking it back", "回退中"),
    "remediation.rolled_back": Phrase("taken back", "已回退"),
    "remediation.succeeded": Phrase("succeeded", "已修复"),
    "remediation.failed": Phrase("failed", "失败"),
    "remediation.aborted": Phrase("aborted", "已中止"),
    "remediation.rehearsed": Phrase("rehearsed", "已演练"),
    "supervisor.active": Phrase("active", "运行中"),
    "supervisor.activating": Phrase("activating", "正在启动"),
    "supervisor.deactivating": Phrase("deactivating", "正在停止"),
    "supervisor.auto-restart": Phrase("restarting by itself", "自动重启中"),
    "supervisor.inactive": Phrase("inactive", "未运行"),
    "supervisor.failed": Phrase("failed", "失败"),
    "supervisor.unknown": Phrase("unknown", "未知"),
    "mode.observe": Phrase("observe", "观察"),
    "mode.approve": Phrase("approve", "审批"),
    "mode.auto": Phrase("auto", "自动"),
    **remedies.STEPS,
    **remedies.OPTIONS,
}

_TITLES: Final = {
    "badge.resolved": Phrase("RESOLVED", "已恢复"),
    "badge.planned": Phrase("PLANNED", "已计划"),
    "badge.awaiting_approval": Phrase("APPROVE?", "待审批"),
    "badge.applying": Phrase("FIXING", "处置中"),
    "badge.verifying": Phrase("VERIFYING", "验证中"),
    "badge.rolling_back": Phrase("TAKING BACK", "回退中"),
    "badge.rolled_back": Phrase("TAKEN BACK", "已回退"),
    "badge.succeeded": Phrase("FIXED", "已修复"),
    "badge.failed": Phrase("FAILED", "处置失败"),
    "badge.aborted": Phrase("STOPPED", "已中止"),
    "badge.dry_run": Phrase("DRY RUN", "演练"),
    "fact.resolved": Phrase("{alert} over after {lasted}", "{alert} 已恢复，历时 {lasted}"),
    "fact.planned": Phrase("{steps} planned", "计划{steps}"),
    "fact.awaiting_approval": Phrase("{steps} waits for approval", "{steps}等待审批"),
    "fact.applying": Phrase("{steps} under way", "正在{steps}"),
    "fact.verifying": Phrase("{steps} done, watching the result", "{steps}已执行，正在验证"),
    "fact.rolling_back": Phrase("{steps}: {outcome} · taking it back", "{steps}：{outcome} · 正在回退"),
    "fact.rolled_back": Phrase(
        "{steps}: {outcome} · taken back, a person is needed", "{steps}：{outcome} · 已回退，需要人工"
    ),
    "fact.succeeded": Phrase("{steps}: {outcome}", "{steps}：{outcome}"),
    "fact.failed": Phrase("{steps}: {outcome} · a person is needed", "{steps}：{outcome} · 需要人工"),
    "fact.aborted": Phrase("{steps}: {outcome}", "{steps}：{outcome}"),
    "fact.dry_run": Phrase("would {steps}, nothing was touched", "本应{steps}，未做任何改动"),
    "suffix.dry_run": Phrase(" (dry run)", "（演练）"),
}

_LINES: Final = {
    "join.steps": Phrase(", then ", "，再"),
    "join.costs": Phrase("; ", "；"),
    "did.plan": Phrase("gpuwatch will {steps} {server}{dry}.", "gpuwatch 将{steps} {server}{dry}。"),
    "did.ask": Phrase(
        "gpuwatch asks to {steps} {server} and waits for approval{dry}.",
        "gpuwatch 请求{steps} {server}，等待审批{dry}。",
    ),
    "did.refused": Phrase(
        "Would {steps} {server}{dry}. Does not: {why}.",
        "本应{steps} {server}{dry}，但未执行：{why}。",
    ),
    "did.nothing": Phrase("gpuwatch does nothing: {why}.", "gpuwatch 不处置：{why}。"),
    "did.undecided": Phrase("gpuwatch has not decided yet.", "gpuwatch 尚未决定。"),
    "because": Phrase("Because of {cause}", "起因：{cause}"),
    "it_was": Phrase("It was: {summary}", "原告警：{summary}"),
    "runbook": Phrase("Runbook: {text}", "处理指引：{text}"),
    "next.status": Phrase("Next: `gpuwatch status`", "下一步：`gpuwatch status`"),
    "next.approve": Phrase(
        "Next: `gpuwatch approve {id}` or `gpuwatch deny {id}`",
        "下一步：`gpuwatch approve {id}` 或 `gpuwatch deny {id}`",
    ),
}

_FIELDS: Final = {
    "field.alert": Phrase("Alert", "告警"),
    "field.server": Phrase("Server", "服务"),
    "field.value": Phrase("Value", "当前值"),
    "field.since": Phrase("Since", "开始时间"),
    "field.lasted": Phrase("Lasted", "持续"),
    "field.mode": Phrase("Mode", "模式"),
    "field.remediation": Phrase("Remediation", "处置"),
    "field.cost": Phrase("Cost", "代价"),
}

_CLI: Final = {
    "cli.host": Phrase("Host", "主机"),
    "cli.mode": Phrase("Mode", "模式"),
    "cli.gpus": Phrase("GPUs", "GPU"),
    "cli.servers": Phrase("Servers", "服务"),
    "cli.alerts": Phrase("Alerts", "告警"),
    "cli.remediations": Phrase("Remediations", "处置"),
    "cli.refusals": Phrase("Not done, and why", "未处置及原因"),
    "cli.receivers": Phrase("Receivers", "接收方"),
    "cli.none": Phrase("none", "无"),
    "cli.all_quiet": Phrase("all quiet", "一切正常"),
    "cli.since": Phrase("since {since}", "自 {since}"),
    "cli.last_look": Phrase("last look {age} ago", "上次检查于 {age}前"),
    "cli.not_running": Phrase(
        "gpuwatch is not running (start it: `systemctl start gpuwatch`)",
        "gpuwatch 未运行（启动：`systemctl start gpuwatch`）",
    ),
    "cli.paused": Phrase("paused until {until}", "已暂停至 {until}"),
    "cli.unsent": Phrase("{count} messages wait", "{count} 条消息待发"),
    "cli.delivers": Phrase("delivers", "正常"),
    "cli.broken": Phrase("broken since {since}: {detail}", "自 {since} 起不可用：{detail}"),
}

CATALOGUE: Final = {
    **REFUSALS,
    **OUTCOMES,
    **_STATES,
    **_TITLES,
    **_LINES,
    **_FIELDS,
    **_CLI,
    **remedies.HISTORY,
    **console.CONSOLE,
}
