"""Settings and rule files, decoded with errors that name file and line; the only YAML."""

from gpuwatch.config.duration import Duration
from gpuwatch.config.rulefiles import load_rules
from gpuwatch.config.settings import (
    DEFAULT_POLICIES,
    BudgetSettings,
    DingTalkSettings,
    Policy,
    ProcessSettings,
    ReceiverSettings,
    RemediationSettings,
    RemoteWriteSettings,
    ServerSettings,
    Settings,
    SlackSettings,
    SourceSettings,
    StoreSettings,
    SupervisorSettings,
    load_settings,
    rule_paths,
    shown,
    with_rules,
)

__all__ = [
    "DEFAULT_POLICIES",
    "BudgetSettings",
    "DingTalkSettings",
    "Duration",
    "Policy",
    "ProcessSettings",
    "ReceiverSettings",
    "RemediationSettings",
    "RemoteWriteSettings",
    "ServerSettings",
    "Settings",
    "SlackSettings",
    "SourceSettings",
    "StoreSettings",
    "SupervisorSettings",
    "load_rules",
    "load_settings",
    "rule_paths",
    "shown",
    "with_rules",
]
