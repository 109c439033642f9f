from common import cli

from tbtc.train import main  # train.py under the source's name

if __name__ == "__main__":
    cli.run(main)
