"""Go's templates with Prometheus' functions, as labels and annotations of alerts use them."""

from gpuwatch.rules.templates.pipelines import TemplateError
from gpuwatch.rules.templates.template import NO_CONTEXT, Context, Template

__all__ = ["NO_CONTEXT", "Context", "Template", "TemplateError"]
