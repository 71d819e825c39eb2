"""`ropeway rehearse`: every stage of a profile on a few records, in a workspace of its own under `.work/rehearse`.

`rehearsal` starts and displays it, `rehearse_steps` runs it in a supervised process. What is made smaller is decided by
`shrink`, a pure function; `source_samples` and `stand_in` provide records and, where the real base is missing or too
large, a small model.
"""
