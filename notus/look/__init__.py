"""A page to look at pairs, sort, filter and mark them: `python -m notus.look`.

gather     the rows that SOURCE names, and their records
record     a row -> what the page shows of it, and its numbers
scores     what a model says of pairs
selection  the rows that a page holds
page       rows -> one HTML file, with page.html, page.css and the scripts
look       the command
"""
