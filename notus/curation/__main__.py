import sys

from notus.curation.curate import main

sys.exit(main())
