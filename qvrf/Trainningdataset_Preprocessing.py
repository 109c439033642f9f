from qvrf.preprocess import cli, main  # preprocess.py under the source's name

if __name__ == "__main__":
    cli.run(main)
