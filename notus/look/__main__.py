import sys

from notus.look.look import main

sys.exit(main())
