"""A page to look at pairs, sort, filter and mark them: `python -m notus.look`.

gather     rows of a source -> what the page shows of them, and their numbers
scores     what a model says of pairs
selection  the rows that a page holds
page       rows -> one HTML file
look       the command
"""
