from tune_kd.cli import main

main()
