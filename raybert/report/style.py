"""The look of the page: calm, light or dark as the reader's system is, one column on a phone."""

STYLE = """
:root{--paper:#fbfbfa;--card:#fff;--ink:#22262b;--muted:#68707a;--line:#e3e5e8;--main:#2f6f9f;
--pale:#b9cfdf;--second:#c7722b;--warn:#a33a3a;--good:#2f7d55}
@media(prefers-color-scheme:dark){:root{--paper:#15181c;--card:#1d2126;--ink:#dfe3e8;
--muted:#98a1ab;--line:#333a42;--main:#77b2dd;--pale:#3c566a;--second:#e2a063;--warn:#e08585;
--good:#79c79c}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1060px;padding:1.5rem 1.25rem 3rem;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
h1{font-size:1.7rem;margin:0 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.3rem;margin:2.2rem 0 .8rem;padding-top:1.2rem;border-top:1px solid var(--line)}
h3{font-size:1rem;margin:1.6rem 0 .5rem}
header .tiles{margin-top:1rem}
.kicker{margin:0;color:var(--muted);letter-spacing:.04em}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1rem}
a{color:var(--main)}
small,footer{color:var(--muted);font-size:.8rem}
footer{margin-top:3rem}
.badge{font-size:.75rem;font-weight:500;vertical-align:middle;padding:.1rem .55rem;
border:1px solid var(--line);border-radius:1rem;color:var(--muted)}
.done{color:var(--good)}
.problem{color:var(--warn)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(132px,1fr));gap:.7rem}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.6rem .8rem}
.tile small,.tile b{display:block}
.tile b{font-size:1.1rem;font-weight:600;white-space:nowrap;overflow:hidden;
text-overflow:ellipsis;font-variant-numeric:tabular-nums}
.plots{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr));gap:.9rem;
margin:1rem 0}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:.6rem;
padding:.7rem .8rem .4rem;break-inside:avoid}
figcaption{font-weight:600;font-size:.9rem;margin-bottom:.3rem}
svg{display:block;width:100%;height:auto}
svg text{font-family:inherit!important}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .7rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
thead th{color:var(--muted);font-weight:500}
tbody th{font-weight:500;white-space:nowrap}
.facts td{overflow-wrap:anywhere}
.heat{background:color-mix(in srgb,var(--main) calc(var(--heat)*45%),transparent)}
.cards{padding:0;margin:0;list-style:none;display:grid;gap:.8rem;
grid-template-columns:repeat(auto-fill,minmax(min(100%,420px),1fr))}
.cards li{border-left:3px solid var(--warn);padding:.1rem 0 .1rem .8rem;break-inside:avoid}
.cards p,blockquote{margin:0;overflow-wrap:anywhere}
blockquote{color:var(--muted);font-size:.88rem;margin-top:.2rem}
details{margin:.9rem 0}
summary{cursor:pointer;font-weight:600}
pre{background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.8rem;
overflow-x:auto;font-size:.8rem;line-height:1.45}
@media print{:root{--paper:#fff;--card:#fff;--ink:#111;--muted:#555;--line:#ccc;--main:#2f6f9f;
--pale:#b9cfdf;--second:#c7722b;--warn:#a33a3a;--good:#2f7d55}body{max-width:none;padding:0;
font-size:11px}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}nav{display:none}}
"""
