"""The one exception for what a user can get wrong."""


class UserError(ValueError):
    """The configuration, the data or the model folder is not usable as it stands.

    The message names the file, row or key, what was found and what was expected. The commands
    print the message alone, without a traceback, and exit with code 2. Everything that is not a
    UserError is a defect of this project and keeps its traceback.
    """
