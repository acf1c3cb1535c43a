"`python -m biojepa` is the command `biojepa`."
from .report.command import main

if __name__ == "__main__": main()
