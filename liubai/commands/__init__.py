"""The commands of the command line that are more than a few lines, a file a group; ``cli.py`` names them."""
