from common import cli

from qvrf.preprocess import main  # preprocess.py under the source's name

if __name__ == "__main__":
    cli.run(main)
