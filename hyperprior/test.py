from common import cli

from hyperprior.eval import main  # eval.py under the source's name

if __name__ == "__main__":
    cli.run(main)
