"""`lookahead evaluate`: methods, drawn by a back end, judged by measures, compared over people.

protocol.py   one YAML file says it all          people.py    who, and where a target is known
methods.py    what is compared, a class a kind    host.py, diffusers.py   the two back ends
measures.py   what judges, a class a kind         run.py, store.py        pictures and scores, resumable
figures.py    intervals over people               report.py, plot.py      the page, tables, grids
cost.py       a dry run
"""
