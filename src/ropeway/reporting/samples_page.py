"""samples.html: samples.json for eyes. One file, opens from disk, says everything without its script.

Every text is escaped: prompts and answers are other people's and a model's.
"""

import json
from collections.abc import Mapping
from html import escape
from typing import Any

STYLE = """
:root{--paper:#f6f7f9;--card:#fff;--ink:#1b2430;--dim:#667085;--line:#e1e5eb;--accent:#0f766e;--soft:#e6f2f0}
@media (prefers-color-scheme:dark){:root{--paper:#12161c;--card:#1a2029;--ink:#e4e8ee;--dim:#97a3b4;--line:#2b3440;
--accent:#4fd1bf;--soft:#17302d}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
header,main{max-width:1240px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:24px;margin:0 0 4px}
header p{color:var(--dim);margin:0}
nav{position:sticky;top:0;background:var(--paper);border-bottom:1px solid var(--line);padding:12px 0;z-index:1}
nav div{max-width:1240px;margin:0 auto;padding:0 20px;display:flex;flex-wrap:wrap;gap:8px 16px;align-items:center}
nav input[type=search]{font:inherit;padding:5px 10px;border:1px solid var(--line);border-radius:6px;width:300px;
background:var(--card);color:var(--ink)}
nav label{color:var(--dim);cursor:pointer;white-space:nowrap}nav label:hover{color:var(--ink)}
nav input[type=checkbox]{accent-color:var(--accent);margin:0 5px 0 0}
#count{color:var(--dim);margin-left:auto}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;margin:16px 0;padding:14px 20px 4px}
h2{font-size:17px;margin:0 0 10px;white-space:pre-wrap;overflow-wrap:anywhere}
.row{display:grid;grid-template-columns:130px repeat(var(--models),minmax(0,1fr));gap:0 20px;padding:10px 0;
border-top:1px solid var(--line)}
.row h3{font-size:13.5px;margin:2px 0 0}
.row small{color:var(--dim);display:block;font:11.5px/1.45 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;
overflow-wrap:anywhere}
.head{border-top:0;padding:0 0 4px}.head b{font-size:12.5px;color:var(--dim);font-weight:600}
.text{white-space:pre-wrap;overflow-wrap:anywhere;font-size:14px;unicode-bidi:plaintext}
.row:not(.head)>.text:last-child{background:var(--soft);border-radius:6px;padding:4px 10px;margin:-4px 0}
.nothing{color:var(--dim);font-style:italic}
details{color:var(--dim);font-size:13px;margin:6px 0 0}pre{white-space:pre-wrap;margin:6px 0}
[hidden]{display:none!important}
@media (max-width:760px){.row{grid-template-columns:1fr}.head{display:none}.text::before{content:attr(data-model) ": ";
color:var(--dim)}}
@media print{nav{display:none}section{break-inside:avoid}}
"""
_SCRIPT = """
const wish=document.querySelector('#filter'),boxes=[...document.querySelectorAll('nav [type=checkbox]')];
function show(){const words=wish.value.toLowerCase(),on=new Set(boxes.filter(b=>b.checked).map(b=>b.value));let seen=0;
for(const part of document.querySelectorAll('section')){
const rows=[...part.querySelectorAll('.row[data-config]')];
const asked=part.querySelector('h2').textContent.toLowerCase().includes(words);let some=false;
for(const row of rows){const hit=asked||[...row.querySelectorAll('.text')].some(t=>t.textContent.toLowerCase().
includes(words));
row.hidden=!(hit&&on.has(row.dataset.config));some=some||!row.hidden}
part.hidden=!some;seen+=some}
document.querySelector('#count').textContent=seen+' of '+document.querySelectorAll('section').length+' prompts'}
wish.addEventListener('input',show);boxes.forEach(b=>b.addEventListener('change',show));
document.querySelector('nav').hidden=false;show();
"""


def draw_page(report: Mapping[str, Any]) -> str:
    """Return the page of a samples.json: a card per prompt, a row per configuration, a column per model."""
    first = report["prompts"][0]["results"]
    pairs = [result["sampling_config"].split("/", 1) for result in first]
    models = list(dict.fromkeys(model for model, _ in pairs))
    configs = list(dict.fromkeys(config for _, config in pairs))
    name, args = escape(report["model_name"]), escape(json.dumps(report["args"], indent=1, sort_keys=True))
    boxes = "".join(
        f'<label><input type="checkbox" value="{escape(config)}" checked>{escape(config)}</label>' for config in configs
    )
    cards = "".join(_draw_prompt(one, models, configs) for one in report["prompts"])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}: sample answers</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{STYLE}:root{{--models:{len(models)}}}</style></head>\n<body>"
        f"<header><h1>{name}: sample answers</h1><p>{len(report['prompts']):,} prompts, {len(configs)} ways to draw "
        f"an answer, {' beside '.join(map(escape, models))}. The same as JSON: samples.json</p>"
        f"<details><summary>Settings</summary><pre>{args}</pre></details></header>\n"
        '<nav hidden><div><input id="filter" type="search" placeholder="Filter prompts and answers" '
        f'aria-label="Filter prompts and answers">{boxes}<span id="count"></span></div></nav>\n'
        f"<main>{cards}</main>\n<script>{_SCRIPT}</script></body></html>\n"
    )


def _draw_prompt(one: Mapping[str, Any], models: list[str], configs: list[str]) -> str:
    found = {result["sampling_config"]: result for result in one["results"]}
    heads = "".join(f"<b>{escape(model)}</b>" for model in models)
    rows = [
        f'<div class="row" data-config="{escape(config)}"><div><h3>{escape(config)}</h3>'
        f"<small>{_draw_settings(found[f'{models[0]}/{config}']['sampling_params'])}</small></div>"
        + "".join(_draw_answer(model, found[f"{model}/{config}"]["outputs"]) for model in models)
        + "</div>\n"
        for config in configs
    ]
    return (
        f'<section><h2>{escape(one["prompt"])}</h2><div class="row head"><span></span>{heads}</div>\n'
        f"{''.join(rows)}</section>\n"
    )


def _draw_settings(params: Mapping[str, Any]) -> str:
    return "<br>".join(f"{escape(key)} {escape(json.dumps(value))}" for key, value in sorted(params.items()))


def _draw_answer(model: str, outputs: list[str]) -> str:
    texts = [escape(text.strip()) or '<span class="nothing">nothing: it ends at once</span>' for text in outputs]
    return f'<div class="text" data-model="{escape(model)}">{"<hr>".join(texts)}</div>'
