//! The program `ecso`.

fn main() -> std::process::ExitCode {
    ecso_cli::main()
}
