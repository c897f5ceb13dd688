"""A conversation template as jinja: what a tokenizer carries for tools that do not read config.json."""

from __future__ import annotations

import json
import re

from internvl.data.templates import Template, find_template
from internvl.tokens import IMAGE_MARK


def chat_template(template: str | Template, system_message: str | None = None) -> str:
    """The renderer of templates.py as a jinja template.

    Texts, or lists of text and image parts; a picture is `<image>`, several of a message are numbered, as in `render`.
    """
    form = find_template(template)
    text = form.system_message if system_message is None else system_message
    words = {
        "SYSTEM": text,
        "SYSTEM_START": form.system_start,
        "SYSTEM_END": form.system_end,
        "USER_START": form.user_start,
        "USER_END": form.user_end,
        "ANSWER_START": form.assistant_start,
        "ANSWER_END": form.assistant_end + form.assistant_tail,
        "GAP": form.gap,
        "MARK": f"{IMAGE_MARK}\n",
    }
    return re.sub(r"\b[A-Z_]{3,}\b", lambda name: _quoted(words[name.group()]), _JINJA)


def _quoted(text: str) -> str:
    """A string of jinja; without line breaks of its own, so that white-space control cannot touch it."""
    return json.dumps(text, ensure_ascii=False)


_JINJA = """\
{%- set seen = namespace(images=0) -%}
{%- macro say(content) -%}
  {%- if content is string -%}{{- content -}}
  {%- else -%}
    {%- set pictures = content | selectattr('type', 'in', ['image', 'image_url', 'input_image']) | list -%}
    {%- for part in content -%}
      {%- if part in pictures -%}
        {%- set seen.images = seen.images + 1 -%}
        {%- if pictures | length > 1 -%}{{- 'Image-' ~ seen.images ~ ': ' -}}{%- endif -%}{{- MARK -}}
      {%- else -%}{{- part['text'] -}}{%- endif -%}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set told = messages and messages[0]['role'] == 'system' -%}
{{- SYSTEM_START -}}{%- if told -%}{{- say(messages[0]['content']) -}}{%- else -%}{{- SYSTEM -}}{%- endif -%}
{{- SYSTEM_END -}}
{%- for message in (messages[1:] if told else messages) -%}
  {%- if message['role'] == 'user' -%}{{- USER_START ~ GAP ~ say(message['content']) ~ USER_END -}}
  {%- elif message['role'] == 'assistant' -%}{{- ANSWER_START ~ GAP ~ say(message['content']) ~ ANSWER_END -}}
  {%- else -%}{{- raise_exception('a system message that is not the first message; move it to the front') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- ANSWER_START -}}{%- endif -%}
"""
