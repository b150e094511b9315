import sys

from notus.curation.command import main

sys.exit(main())
