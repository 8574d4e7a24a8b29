"""Git repositories as tasks: read at a commit, worked on and graded in a box.

`tree` reads a commit, `workspace` carries out one order in a sandbox by the
program `inside`, `grading` runs hidden tests and reads their JUnit reports,
`languages` says how tests are found and run, `decoys` writes tests that have to
fail, so that a run in which everything passes is known for a forgery.
"""
