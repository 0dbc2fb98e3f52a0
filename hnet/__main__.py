from hnet.cli import main

main()
