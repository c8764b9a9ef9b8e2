"""The page's one style sheet: light and dark, on paper, and for those who see colours otherwise.

Outcomes are blue, amber and crimson, which differ in lightness too, and each is written out beside
its colour.
"""

from __future__ import annotations

from typing import Final

STYLE: Final = """
:root {
  color-scheme: light dark;
  --paper: #fbfbf9; --card: #ffffff; --ink: #1b1f24; --soft: #5b6470; --line: #d9dce0;
  --faint: #eef0f2; --direct: #2563c9; --relayed: #c77a0a; --failed: #c01f4a; --denied: #7a8594;
  --unasked: #b3bac2; --good: #18794e; --bad: #c01f4a; --on: #ffffff; --mark: #fff3d6;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #14171b; --card: #1b1f25; --ink: #e6e9ed; --soft: #9aa4b0; --line: #343b44;
  --faint: #242a31; --direct: #6ea1f7; --relayed: #f0ad43; --failed: #f7678c; --denied: #8b96a4;
  --unasked: #5a636e; --good: #4cc38a; --bad: #f7678c; --on: #0e1013; --mark: #3a3120;
} }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
.skip { position: absolute; left: -999px; }
.skip:focus { left: 1rem; top: 1rem; background: var(--card); padding: .4rem .8rem; z-index: 2; }
main, header.top { max-width: 76rem; margin: 0 auto; padding: 0 1.5rem; }
header.top { padding-top: 2.2rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; letter-spacing: -.01em; }
h2 { font-size: 1.15rem; margin: 0 0 .2rem; letter-spacing: -.005em; }
h3 { font-size: .95rem; margin: 1rem 0 .3rem; }
p { margin: .2rem 0 .8rem; max-width: 62rem; }
p.lead, .note { color: var(--soft); }
.note { font-size: .88rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; margin: .9rem 0 0; font-size: .9rem; }
a { color: var(--direct); text-underline-offset: .15em; }
a:focus-visible, summary:focus-visible, .scroll:focus-visible {
  outline: 2px solid var(--direct); outline-offset: 2px; border-radius: 3px; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: 1.1rem 1.3rem 1.2rem; margin: 1.1rem 0; }
.badge { display: inline-block; border-radius: 99px; padding: .12rem .75rem; font-weight: 600;
  font-size: .9rem; color: var(--on); background: var(--good); }
.badge.bad { background: var(--bad); }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .8rem;
  margin: 1.2rem 0 0; padding: 0; list-style: none; }
.cards li { background: var(--card); border: 1px solid var(--line); border-radius: 10px;
  padding: .7rem .95rem; }
.cards b { display: block; font-size: 1.45rem; line-height: 1.25; font-weight: 650;
  font-variant-numeric: tabular-nums; }
.cards span { color: var(--soft); font-size: .85rem; }
.cards .bad b { color: var(--bad); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
caption { text-align: left; color: var(--soft); padding: 0 0 .4rem; }
caption span { display: inline-block; position: sticky; left: 0; max-width: calc(100vw - 4rem); }
th { text-align: left; font-weight: 600; color: var(--soft); white-space: nowrap; }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
tbody th { color: var(--ink); font-weight: 500; white-space: normal; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td.t { overflow-wrap: anywhere; }
code, .mono { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; font-size: .86em;
  overflow-wrap: anywhere; }
pre { background: var(--faint); border-radius: 6px; padding: .7rem .9rem; overflow-x: auto;
  white-space: pre-wrap; }
.ok { color: var(--good); font-weight: 650; } .no { color: var(--bad); font-weight: 650; }
summary { cursor: pointer; color: var(--direct); margin: .6rem 0 .4rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0;
  margin: .3rem 0 .6rem; font-size: .86rem; color: var(--soft); }
.legend svg { vertical-align: -2px; margin-right: .35rem; }
figure { margin: .5rem 0 0; }
.pair { display: grid; gap: 0 2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); }
.pair figure { min-width: 0; }
svg.chart { display: block; max-width: 100%; height: auto; }
svg.fits { width: 100%; max-width: 34rem; }
svg.fits line, svg.fits path { vector-effect: non-scaling-stroke; }
svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg text.s { fill: var(--soft); font-size: 11px; }
svg.fits text, svg.fits text.s { font-size: 8.5px; }
svg text.on { fill: var(--on); } svg text.b { font-weight: 650; }
svg text.e { text-anchor: end; } svg text.m { text-anchor: middle; }
.direct { fill: var(--direct); } .relayed { fill: var(--relayed); } .failed { fill: var(--failed); }
.denied { fill: var(--denied); } .unasked { fill: var(--unasked); } .faint { fill: var(--faint); }
.soft { fill: var(--soft); } .card { fill: var(--card); } .good { fill: var(--good); }
.axis { stroke: var(--line); stroke-width: 1; fill: none; }
.wire { stroke: var(--soft); stroke-width: 1.2; fill: none; opacity: .55; }
.box { fill: var(--faint); stroke: var(--line); }
.line { fill: none; stroke-width: 2; }
.line.direct, .line.relayed, .line.good, .line.failed { fill: none; }
.line.direct { stroke: var(--direct); } .line.relayed { stroke: var(--relayed); }
.line.good { stroke: var(--good); } .line.failed { stroke: var(--failed); }
.dash { stroke-dasharray: 5 4; }
.arrow { stroke: var(--soft); stroke-width: 1.3; fill: none; }
.arrow.drop { stroke: var(--failed); } .arrow.wireguard { stroke: var(--direct); }
.arrow.turn { stroke: var(--relayed); } .arrow.channel { stroke: var(--good); }
.head { fill: var(--soft); } .head.drop { fill: var(--failed); }
.head.wireguard { fill: var(--direct); }
.head.turn { fill: var(--relayed); } .head.channel { fill: var(--good); }
footer { max-width: 76rem; margin: 0 auto; padding: .4rem 1.5rem 2.5rem; color: var(--soft);
  font-size: .86rem; }
@media (prefers-reduced-motion: no-preference) { html { scroll-behavior: smooth; } }
@media screen and (max-width: 60rem) { .scroll > svg.chart:not(.narrow) { max-width: none; } }
@media (max-width: 40rem) {
  main, header.top, footer { padding-left: .8rem; padding-right: .8rem; }
  section { padding-left: .9rem; padding-right: .9rem; }
  svg.fits text { font-size: 12px; } svg.fits text.s { font-size: 11px; }
  .cards { grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --soft: #444; --line: #bbb; --faint: #f2f2f2; }
  body { font-size: 10.5pt; } nav, .skip { display: none; }
  section { border: 0; border-top: 1px solid #999; border-radius: 0; padding: .6rem 0; }
  section, figure, tr { break-inside: avoid; }
  .badge, .badge.bad { color: #000; background: none; padding: 0; }
  .scroll { overflow: visible; } .pair { grid-template-columns: 1fr 1fr; }
  svg.chart { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
}
""".strip()
