"""Style and the one small script of report.html; the page says everything without the script."""

STYLE = """
:root{--paper:#f6f7f9;--card:#fff;--ink:#1b2430;--dim:#667085;--line:#e1e5eb;--learn:#bfe6dc;--learn-ink:#06382e;
--read:#eceff3;--read-ink:#4a5565;--accent:#0f766e;--warn:#b45309;--over:#e08a1e;
--p0:#0f766e;--p1:#8fb8b2;--p2:#e08a1e;--p3:#cbd3dd;--p4:#7c6fc4;--p5:#e3e7ed;--p6:#c2556b}
@media (prefers-color-scheme:dark){:root{--paper:#12161c;--card:#1a2029;--ink:#e4e8ee;--dim:#97a3b4;--line:#2b3440;
--learn:#0f4f45;--learn-ink:#d5f5ee;--read:#252d38;--read-ink:#aeb8c6;--accent:#4fd1bf;--warn:#f0b060;--over:#e09a3e;
--p0:#2fb3a2;--p1:#2f6660;--p2:#e09a3e;--p3:#465262;--p4:#8f83d8;--p5:#333d4a;--p6:#d9748a}}
*{box-sizing:border-box}
body{margin:0;background:var(--paper);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,
"Helvetica Neue",Arial,sans-serif}
header,main{max-width:1240px;margin:0 auto;padding:0 20px}
header{padding-top:28px}
h1{font-size:24px;margin:0 0 4px}h2{font-size:18px;margin:0}h3{font-size:14px;margin:18px 0 6px;color:var(--dim);
font-weight:600}
header p{color:var(--dim);margin:0}header span{white-space:nowrap}
p{margin:8px 0}
a{color:var(--accent)}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:16px 20px;margin:16px 0}
.wide{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px}
th,td{text-align:left;padding:4px 10px 4px 0;border-bottom:1px solid var(--line);font-weight:400;white-space:nowrap}
tr:last-child>*{border-bottom:0}
thead th{color:var(--dim);font-size:12.5px}
tbody th{font-weight:600}
.n{text-align:right;font-variant-numeric:tabular-nums}
.warn{color:var(--warn);font-weight:600}
small{color:var(--dim)}
.ledger .leaves>*{color:var(--dim)}.ledger .leaves th{padding-left:12px}.ledger th{font-weight:400}
.ledger+*,.two details{font-size:13.5px}
.ledger .stays th{font-weight:600}.ledger .zero>*{opacity:.55}
.ledger td:first-child{width:14px;padding-right:4px;color:var(--dim)}
.bar{display:flex;height:14px;min-width:200px;border-radius:4px;overflow:hidden;background:var(--line)}
.bar i{display:block;flex:0 1 0;min-width:1px}
.p0{background:var(--p0)}.p1{background:var(--p1)}.p2{background:var(--p2)}.p3{background:var(--p3)}
.p4{background:var(--p4)}.p5{background:var(--p5)}.p6{background:var(--p6)}
.barkey{font-size:12.5px;color:var(--dim);display:flex;flex-wrap:wrap;gap:2px 14px}
.barkey i{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:5px}
#filter{float:right;font:inherit;padding:3px 8px;border:1px solid var(--line);border-radius:6px;background:var(--paper);
color:var(--ink);margin-top:-28px}
summary{cursor:pointer}
summary h2{display:inline;margin-right:10px}
summary span{color:var(--dim)}
.two{display:grid;grid-template-columns:minmax(0,1fr) minmax(0,1fr);gap:0 32px}
svg{display:block;width:100%;height:auto}
svg rect{fill:var(--p0)}svg rect.over{fill:var(--over)}
svg text{fill:var(--dim);font-size:12px}
svg path{fill:none;stroke:var(--line)}
svg path.limit{stroke:var(--over);stroke-width:1.5;stroke-dasharray:4 3}svg text.limit{fill:var(--warn);font-weight:600}
.sample{border-top:1px solid var(--line);padding:10px 0}
.tokens{font:13px/1.85 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
.sample .tokens{max-height:30em;overflow:auto;margin-top:8px}
.tokens p{white-space:pre-wrap;margin:0 0 6px}
.tokens b,.tokens i{font:inherit;unicode-bidi:isolate;border-radius:3px;padding:1px 0;margin-right:1px;
background:var(--read);color:var(--read-ink);-webkit-box-decoration-break:clone;box-decoration-break:clone}
.tokens b{background:var(--learn);color:var(--learn-ink);box-shadow:inset 0 -1.5px 0 var(--accent)}
.tokens u{text-decoration:none;opacity:.45}
.tokens .x{outline:1.5px solid var(--accent);outline-offset:-1px;padding:1px 4px;font-weight:600;margin:0 2px;
display:inline-block;line-height:1.3}
.tokens i.x{outline-color:var(--dim)}
.tokens .c,.tokens .y{font-size:10.5px;opacity:1;border:1px dotted currentColor;padding:0 2px}
.tokens em{font-style:normal;font-size:13px;margin-left:3px}
.tokens .g{background:none;outline:1.5px dashed var(--accent);padding:1px 4px;margin-left:4px;color:inherit}
.gap,.piece{font:12px system-ui,sans-serif;color:var(--dim)}
.piece{display:inline-block;border-left:4px solid var(--p4);padding-left:8px;color:var(--ink);font-weight:600}
.legend{list-style:none;padding:0;margin:10px 0;display:grid;gap:6px 24px;
grid-template-columns:repeat(auto-fill,minmax(min(100%,520px),1fr))}
.legend li{display:flex;gap:10px;align-items:baseline}
.legend .key{flex:0 0 128px;white-space:nowrap}
code{font-size:12.5px;background:var(--read);border-radius:4px;padding:1px 5px;overflow-wrap:anywhere}
ol{padding-left:26px;margin:8px 0}
[hidden]{display:none!important}
@media (max-width:860px){.two{grid-template-columns:minmax(0,1fr)}header,main{padding:0 12px}.card{padding:12px 14px}
#filter{float:none;margin:8px 0 0;width:100%}.legend .key{flex-basis:96px}}
@media print{.sample .tokens{max-height:none}}
"""

SCRIPT = """
const box=document.getElementById("filter"),all=[...document.querySelectorAll("[data-name]")];
box.hidden=all.length<12;
box.addEventListener("input",()=>{for(const one of all)one.hidden=!one.dataset.name.includes(box.value.trim())});
addEventListener("hashchange",open_);function open_(){const one=document.getElementById(location.hash.slice(1));
if(one&&one.tagName=="DETAILS")one.open=true}open_();
"""
