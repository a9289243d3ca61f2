"""Jinja environment of the report page and of the results tables: templates, HTML escaping, number formats."""

import functools

import jinja2

from router_r1_jax.report.number_format import dollars, escape_markdown, interval, percent, signed_points


@functools.cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("router_r1_jax.report"),
        autoescape=jinja2.select_autoescape(["html"], default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    formats = {f.__name__: f for f in (dollars, escape_markdown, interval, percent, signed_points)}
    environment.globals |= formats
    environment.filters |= formats
    return environment


def render(template: str, **values: object) -> str:
    """The document that a template of `report/templates` makes from the values. Values are escaped in *.html alone."""
    return _environment().get_template(template).render(values)
