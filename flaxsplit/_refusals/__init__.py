"""Every refusal of the library, one row of words each, in the order in which the combinators come.

A combinator says `ROW.unless(condition, ...)` and goes on. What has to guess at a cause is a function here, called only
after a check has failed.
"""
