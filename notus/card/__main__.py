import sys

from notus.card.card import main

sys.exit(main())
